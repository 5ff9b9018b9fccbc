"""A public benchmark tool measures the server as it would any other (its own environment: make test-load)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

TOOL = os.environ.get("FP4_GUIDELLM", "")


@pytest.mark.load
@pytest.mark.skipif(not TOOL, reason="guidellm is in an environment of its own: make test-load")
def test_guidellm_completes_every_request_and_counts_the_tokens_that_it_asked_for(live, chat_folder, tmp_path):
    if not Path(TOOL).is_file():
        pytest.skip(f"{TOOL}: guidellm could not be installed")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [TOOL, "run", "--backend", f"kind=openai_http,target={live.url}", "--profile", "kind=concurrent,streams=4",
         "--constraint", "kind=max_requests,count=24", "--tokenizer", f"kind=huggingface_auto,model={chat_folder}",
         "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=24", "--output", f"kind=json,path={report}",
         "--disable-console"], capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(report.read_text())["benchmarks"][0]
    requests = found["requests"]
    assert len(requests["successful"]) == 24 and not requests["errored"] and not requests["incomplete"]
    assert {r["output_metrics"]["text_tokens"] for r in requests["successful"]} == {24}
    assert set(live.until_empty().values()) == {0}
