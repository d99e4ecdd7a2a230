"""Variable tracking, in RULER's form: which variables come to have a value that is given to one."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

from transformers import PreTrainedTokenizerBase

from arkv_fx.evaluation.haystack import numbers, surround
from arkv_fx.evaluation.tasks.task import Asked, Sample, Task, Turn

VARIABLES = 5  # RULER's chain of four hops
BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
    "According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assigned the value {value}, they are:"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go."


class VariableChains(Task):
    """One chain, hidden in order; a solved example of the same form stands before it, as there."""

    name = "variables"
    help = "the variables of a chain of assignments in a text (RULER)"
    asked = Asked.in_prompt

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """See ``Task.make``."""
        names: list[str] = []
        while len(names) < 2 * VARIABLES:
            name = "".join(random.choices(ascii_uppercase, k=5))
            if name not in names and name.lower() not in text.lower():
                names.append(name)
        shown, wanted = names[:VARIABLES], names[VARIABLES:]
        first, value = numbers(random, text, 2)
        example = [
            BEFORE, *(f"{FILLER}{line}" for line in chain(shown, first)), FILLER,
            asked(first), " ", " ".join(shown), "\n\n\n", BEFORE,
        ]  # fmt: skip
        turn = Turn.of(tokenizer, asked(value), *wanted)
        depths = sorted(random.sample(range(5, 96), VARIABLES))
        document = surround(
            tokenizer, text, tokens - len(turn.question), chain(wanted, value), depths,
            before="".join(example),
        )  # fmt: skip
        return Sample(document, [turn])


def chain(names: list[str], value: str) -> list[str]:
    """The lines that give the first name a value and hand it on to the others."""
    values = [value, *(f"VAR {name}" for name in names)]
    return [f" VAR {name} = {x}. " for name, x in zip(names, values, strict=False)]


def asked(value: str) -> str:
    """The question for the names of a value."""
    return QUESTION.format(value=value, count=VARIABLES)


VARIABLE_CHAINS = VariableChains()
