"""Cases made of the server's own schema, right and wrong: every reply is one that the schema says.

``CASES=10000`` asks more; ``make api-fuzz`` does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = int(os.environ.get("CASES", "2000"))

_COVERAGE, _WITH_BODY = 1200, 3  # cases that go through every field once; endpoints of which more are made

SETTINGS = """
continue-on-failure = true

[checks.positive_data_acceptance]
# A schema cannot say that two tools must not have one name: such requests are refused in words.
expected-statuses = ["200", "400", "404"]

[checks.negative_data_rejection]
expected-statuses = ["400", "404", "405", "413", "415"]

[checks.missing_required_header]
expected-statuses = ["400", "401", "404", "415"]
"""


@pytest.mark.timeout(3600)
def test_every_reply_is_one_that_the_schema_says(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    limits = {"requests_per_minute": 1_000_000}
    with serve(settings={"limits": limits}) as running:
        schema = json.loads(json.dumps(running.app.api.openapi()))
        # Without this nearly every case would be refused for its alias.
        for name in ("ChatRequest", "CompletionRequest", "ScoreRequest"):
            schema["components"]["schemas"][name]["properties"]["model"] = {"enum": ["m"], "type": "string"}
        (tmp_path / "schema.json").write_text(json.dumps(schema))
        examples = max(10, (CASES - _COVERAGE) // _WITH_BODY)
        ran = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("schemathesis")), "run", str(tmp_path / "schema.json")),
                *("--url", running.url, "--checks", "all", "--max-examples", str(examples)),
                *("--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"),
                *("--generation-database", "none"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
        made = re.search(r"(\d+) generated", ran.stdout)
        assert made is not None and int(made.group(1)) > CASES * 0.9, ran.stdout[-800:]
        figures = running.app.metrics.text().decode()
        assert 'refused_total{code="internal_error"}' not in figures
