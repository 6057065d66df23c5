"""The package's own small tokenizer and chat template, for runs without a checkpoint.

Every text is encoded as known words and single bytes, so that decoding returns the same text. The
space between two words belongs to the first one, so the last word of a response is the same token
whether or not words precede it.

    it is red      ->  "it " "is " "red"
    red            ->  "red"
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# A vocabulary of size n holds the first n - 263 words. "_" is the space after a word, "|" the end
# of a line.
TINY_VOCABULARY = """
    red green blue yellow purple white circle square triangle cross diamond ring yes no top
    bottom left right middle centre user| assistant| it_ is_ answer_ :_ i_ think_ the_ what_
    colour_ shape which_ digit_ it how_ many_ shapes_ are_ there larger left_ plus_ where_ tile_
    belongs_ at_ each_ place does_ eat number_ one top_ bottom_ middle_ red_ green_ blue_
    yellow_ purple_ white_ shape_ minus_ ba de fi go ku la me no_ lor_ mik_ tan_ ves_ rud_ sel_
    pon_ zig_ apples bread corn dates eggs figs grapes honey ice jam kale lemons mint nuts
    olives pears quinces rice salt tea beans cheese plums soup fish milk oats peas roots seeds
    cake leaves system| image_ number colour
"""
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer of at most `size` tokens: special tokens, then bytes, then words."""
    to_byte_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if size < smallest:
        raise ValueError(
            f"a vocabulary of {size} is too small; expected at least {smallest}, the special "
            "tokens and the bytes"
        )
    words = [word.replace("_", " ").replace("|", "\n") for word in TINY_VOCABULARY.split()]
    words = words[: size - smallest]
    letters = [to_byte_letters.pre_tokenize_str(word)[0][0] for word in words]
    # The split with the best score is used: few words, bytes where there is no word, and never a
    # special token.
    pieces = (
        [(t, -1e3) for t in SPECIAL_TOKENS]
        + [(c, -10.0) for c in alphabet]
        + [(w, -1.0) for w in letters]
    )
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.pre_tokenizer, inner.decoder = to_byte_letters, decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL_TOKENS))
    end, _, stop, *vision = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=stop,
        pad_token=end,
        additional_special_tokens=vision,
        clean_up_tokenization_spaces=False,
    )
