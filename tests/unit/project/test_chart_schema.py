"""The chart's schema of values: helm refuses what a service would refuse when it starts."""

from __future__ import annotations

import json
from pathlib import Path

from scalellm.services.tokenizer.aliases import FILE_FORMAT

SCHEMA = Path(__file__).resolve().parents[3] / "deploy/chart/values.schema.json"


def test_aliases_have_the_limits_of_the_tokenizer_service() -> None:
    tokenizer = json.loads(SCHEMA.read_text())["properties"]["tokenizer"]["properties"]
    assert tokenizer["aliases"] == FILE_FORMAT.json_schema()
