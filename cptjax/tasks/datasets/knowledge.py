"""Facts that a pretrained model knows: capitals, chemical symbols, opposites; for testing only.

They are held apart from training and show what a model forgets. A response is right if it contains
the answer as a whole word, so its form does not matter.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from cptjax.tasks.task import Examples, Task, did_you_mean, limit_rows, user_turn
from cptjax.types import Example

CAPITALS = """
Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Argentina Buenos Aires;
Armenia Yerevan; Australia Canberra; Austria Vienna; Azerbaijan Baku; Bahrain Manama;
Bangladesh Dhaka; Belarus Minsk; Belgium Brussels; Botswana Gaborone; Brazil Brasilia;
Bulgaria Sofia; Cambodia Phnom Penh; Cameroon Yaounde; Canada Ottawa; Chad N'Djamena;
Chile Santiago; China Beijing; Colombia Bogota; Croatia Zagreb; Cuba Havana; Cyprus Nicosia;
Denmark Copenhagen; Ecuador Quito; Egypt Cairo; Eritrea Asmara; Estonia Tallinn;
Ethiopia Addis Ababa; Fiji Suva; Finland Helsinki; France Paris; Gabon Libreville; Georgia Tbilisi;
Germany Berlin; Ghana Accra; Greece Athens; Guinea Conakry; Haiti Port-au-Prince;
Honduras Tegucigalpa; Hungary Budapest; Iceland Reykjavik; India New Delhi; Indonesia Jakarta;
Iran Tehran; Iraq Baghdad; Ireland Dublin; Italy Rome; Jamaica Kingston; Japan Tokyo; Jordan Amman;
Kenya Nairobi; Kyrgyzstan Bishkek; Laos Vientiane; Latvia Riga; Lebanon Beirut; Libya Tripoli;
Lithuania Vilnius; Madagascar Antananarivo; Malawi Lilongwe; Malaysia Kuala Lumpur; Mali Bamako;
Malta Valletta; Mauritania Nouakchott; Moldova Chisinau; Mongolia Ulaanbaatar; Morocco Rabat;
Mozambique Maputo; Namibia Windhoek; Nepal Kathmandu; Netherlands Amsterdam; Nicaragua Managua;
Nigeria Abuja; Norway Oslo; Oman Muscat; Pakistan Islamabad; Paraguay Asuncion; Peru Lima;
Philippines Manila; Poland Warsaw; Portugal Lisbon; Qatar Doha; Romania Bucharest; Russia Moscow;
Rwanda Kigali; Senegal Dakar; Serbia Belgrade; Slovakia Bratislava; Slovenia Ljubljana;
Somalia Mogadishu; Spain Madrid; Sudan Khartoum; Sweden Stockholm; Switzerland Bern;
Syria Damascus; Taiwan Taipei; Thailand Bangkok; Tunisia Tunis; Turkey Ankara; Uganda Kampala;
Ukraine Kyiv; Uruguay Montevideo; Uzbekistan Tashkent; Venezuela Caracas; Vietnam Hanoi;
Zambia Lusaka; Zimbabwe Harare
"""
# Without the six whose symbol is also an English word, such as arsenic.
ELEMENTS = """
hydrogen H; lithium Li; boron B; carbon C; nitrogen N; oxygen O;
fluorine F; neon Ne; sodium Na; magnesium Mg; silicon Si; phosphorus P; chlorine Cl; argon Ar;
potassium K; calcium Ca; scandium Sc; titanium Ti; vanadium V; chromium Cr; manganese Mn; iron Fe;
cobalt Co; nickel Ni; copper Cu; zinc Zn; gallium Ga; germanium Ge; selenium Se;
bromine Br; krypton Kr; rubidium Rb; strontium Sr; yttrium Y; zirconium Zr; niobium Nb;
molybdenum Mo; technetium Tc; ruthenium Ru; rhodium Rh; palladium Pd; silver Ag; cadmium Cd;
tin Sn; antimony Sb; tellurium Te; xenon Xe; barium Ba; lanthanum La;
cerium Ce; neodymium Nd; samarium Sm; europium Eu; hafnium Hf; tantalum Ta; tungsten W; rhenium Re;
osmium Os; iridium Ir; platinum Pt; gold Au; mercury Hg; thallium Tl; lead Pb; bismuth Bi;
polonium Po; radon Rn; francium Fr; radium Ra; thorium Th; uranium U; neptunium Np;
plutonium Pu
"""
OPPOSITES = """
ancient modern; absent present; accept refuse; alive dead; asleep awake; attack defend; beautiful
ugly; bitter sweet; bottom top; bright dark; buy sell; calm nervous; careful careless; clean dirty;
cold hot; common rare; cruel kind; day night; deep shallow; difficult easy; dry wet; early late;
empty full; enemy friend; entrance exit; even odd; failure success; false true; famous unknown; fast
slow; fat thin; floor ceiling; forget remember; generous selfish; guilty innocent; happy sad; heavy
light; heaven hell; humble proud; increase decrease; inside outside; leader follower; long short;
loose tight; loud quiet; major minor; maximum minimum; north south; ocean land; optimist pessimist;
past future; patient impatient; peace war; permanent temporary; poverty wealth; private public;
question answer; rough smooth; rude polite; sharp blunt; strong weak; student teacher; vertical
horizontal; victory defeat; visible invisible; wide narrow; wild tame; winner loser; young old
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """Facts of one kind: a table of names and answers, and the question and sentence about each."""

    table: str  # "name answer; name answer", each name one word
    question: str
    sentence: str

    def rows(self) -> list[tuple[str, str]]:
        """Return the (name, answer) of each fact."""
        pairs = (entry.split(maxsplit=1) for entry in self.table.split(";"))
        return [(name, " ".join(answer.split())) for name, answer in pairs]


SUBJECTS = {
    "capitals": Subject(
        CAPITALS, "What is the capital of {name}?", "The capital of {name} is {answer}."
    ),
    "elements": Subject(
        ELEMENTS,
        "What is the chemical symbol of {name}?",
        "The chemical symbol of {name} is {answer}.",
    ),
    "opposites": Subject(
        OPPOSITES, 'What is the opposite of "{name}"?', 'The opposite of "{name}" is "{answer}".'
    ),
}


def load_facts(
    name: str,
    subject: str,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    """Return the facts of a subject, which are all test rows; no file is read."""
    if split != "test":
        raise ValueError(f"task {name}: no split {split!r}; facts are for testing only")
    rows = SUBJECTS[subject].rows()
    build = functools.partial(build_fact_example, SUBJECTS[subject])
    return Examples(name, split, rows, build, limit_rows(range(len(rows)), limit, seed))


def build_fact_example(subject: Subject, row: tuple[str, str]) -> Example:
    key, answer = row
    words = {"name": key, "answer": answer}
    question, sentence = (text.format(**words) for text in (subject.question, subject.sentence))
    return Example(key, user_turn(question), answer, sentence)


def make_task(name: str = "knowledge", subject: str = "capitals", **fields: Any) -> Task:
    if subject not in SUBJECTS:
        raise ValueError(
            f"task {name}: no subject {subject!r}{did_you_mean(subject, SUBJECTS)}; "
            f"there are {', '.join(SUBJECTS)}"
        )
    own = {"template": "none", "scorer": "contains_words"}
    return Task(name, functools.partial(load_facts, name, subject), **{**own, **fields})
