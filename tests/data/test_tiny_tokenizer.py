"""The small tokenizer loses no text, and its responses are short."""

from conversation_helpers import TINY, fails

from cptjax.data import tiny_tokenizer


def test_the_small_tokenizer_has_the_presets_ids_and_loses_nothing(tiny):
    assert len(tiny.tokenizer) <= TINY.text.vocab
    assert tiny.tokenizer.convert_tokens_to_ids(list(tiny_tokenizer.SPECIAL_TOKENS)) == list(
        range(7)
    )
    assert (tiny.tokenizer.pad_token_id, tiny.tokenizer.eos_token_id) == (TINY.pad, TINY.eos[0])
    for text in (
        "it is red",
        "  odd   spaces ",
        "Größe 漢字 🙂\t\n\x00",
        "what does gotan eat?",
        "13 plus 26",
        "▁ Ġ <0x41>",
    ):
        assert tiny.decode([tiny.ids(text)]) == [text]
        assert max(tiny.ids(text)) < TINY.text.vocab and min(tiny.ids(text)) >= 7


def test_responses_are_short_and_end_with_the_same_token_however_they_begin(tiny):
    words = lambda text: [tiny.tokenizer.decode([i]) for i in tiny.ids(text)]
    assert words("it is red") == ["it ", "is ", "red"] and words("answer : red") == [
        "answer ",
        ": ",
        "red",
    ]
    assert tiny.ids("red") == tiny.ids("i think red")[2:]
    assert words("what does gotan eat?") == ["what ", "does ", "go", "tan ", "eat", "?"]


def test_any_size_of_the_small_vocabulary_works():
    assert (
        len(tiny_tokenizer.build_tiny_tokenizer(263)) == 263
        and len(tiny_tokenizer.build_tiny_tokenizer(320)) == 320
    )
    assert len(tiny_tokenizer.build_tiny_tokenizer(100_000)) == 263 + len(
        tiny_tokenizer.TINY_VOCABULARY.split()
    )
    fails(lambda: tiny_tokenizer.build_tiny_tokenizer(200), "200", "263")
    ids = tiny_tokenizer.build_tiny_tokenizer(263)("red", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3


def test_synthetic_tasks_are_short(tiny):
    from cptjax.tasks.synthetic import dataset, families

    for family in families.SYNTHETIC_FAMILIES:
        block = dataset.generate_block(
            families.SyntheticSpec(family, styles=(("answer :", 1.0),)), "train", 0, 0, 20
        )
        assert max(len(tiny.ids(question)) for question in block.questions) <= 13, family
        spelled = {"jigsaw2": 7, "jigsaw3": 17, "arithmetic": 2, "position": 2, "count": 2}.get(
            family, 1
        )
        assert max(len(tiny.ids(answer)) for answer in block.answers) <= spelled, family
