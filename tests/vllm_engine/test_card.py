"""The commands of a model card, typed in as they stand there."""

import json
import re
import shlex
import subprocess

from tests.support.tiny import make_model, tiny_trainer
from tests.vllm_engine.servers import serving


def test_the_commands_of_a_card(tmp_path, monkeypatch):
    model = make_model(head_dim=32, num_attention_heads=2)
    tiny_trainer(tmp_path / "model", model=model, card_question="1 2").save_model()
    card = (tmp_path / "model" / "README.md").read_text()
    serve, request = re.findall(r"```bash\n(.*?)\n```", card, flags=re.DOTALL)
    program, subcommand, name, *options = shlex.split(serve)
    assert (program, subcommand, name) == ("vllm", "serve", ".")

    monkeypatch.chdir(tmp_path / "model")
    with serving(["--model", name, *options], tmp_path / "log") as (url, _):
        request = request.replace("curl ", "curl --silent --fail-with-body ").replace("http://localhost:8000", url)
        done = subprocess.run(["bash", "-c", request], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)
    # At most 9 tokens of thinking, then the bridges, then at most 4 tokens and EOS
    assert answer["usage"]["completion_tokens"] <= 9 + 3 + 4 + 1
    message = answer["choices"][0]["message"]  # split by the reasoning parser
    assert message["reasoning"] and re.match(" *answer", message["content"])
