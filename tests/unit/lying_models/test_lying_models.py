"""Model files that lie are loaded or refused in a line: nothing else is raised, hangs or takes memory."""

from pathlib import Path

from lying_bases import gguf_bases, hugging_face_bases
from lying_models import FORMATS, Mutant, mutants, outcome


def test_models_that_are_made_to_lie_load(tmp_path: Path) -> None:
    files = [*hugging_face_bases(), *({"model.gguf": file.encoded()} for file in gguf_bases())]
    for number, base in enumerate(files):
        assert outcome(Mutant("base", number, "", base).write(tmp_path)) == "loaded"


def test_equal_seeds_give_equal_mutants() -> None:
    for name in FORMATS:
        first = list(mutants(name, seed=1, count=20))
        assert first == list(mutants(name, seed=1, count=20))
        assert len({tuple(mutant.files.values()) for mutant in first}) > 15
