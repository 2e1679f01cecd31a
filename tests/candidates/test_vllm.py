"""The real vLLM, offline and as a server, beside transformers: greedy answers agree token for token.

Runs where vLLM is installed; see .ci/vllm_check.sh.
"""

import importlib.util
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from prefopt.candidates.generate import GenerateArguments, run
from prefopt.candidates.records import read_records
from prefopt.files import read_json
from tests.candidates.folders import HARD_PROMPTS, save_prompts, save_tiny
from tests.candidates.launching import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
]

SYSTEM = [{"role": "system", "content": "Be kind to None."}, {"role": "user", "content": "Who is 你?"}]
PROMPTS = [{"prompt": [{"role": "user", "content": text}]} for text in [*HARD_PROMPTS, "word " * 90]]
PROMPTS.append({"prompt": SYSTEM})
GREEDY = {"num_samples": 1, "temperature": 0, "max_new_tokens": 40, "shard_size": 3, "dtype": "float32"}
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # the CPU engine takes heads of at least 32; a repeated token makes some greedy answers end by themselves
    return save_tiny(
        tmp_path_factory.mktemp("model"), hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def expected(model, prompts, tmp_path_factory):
    """Greedy answers of the transformers backend, some of which end by a stop token of the recipe."""
    folder = tmp_path_factory.mktemp("expected")
    first = read_records(run(GenerateArguments(model, prompts, str(folder / "a"), **GREEDY)))
    stop = most_common_token(model, first)
    settings = {**GREEDY, "stop_token_ids": [stop]}
    records = read_records(run(GenerateArguments(model, prompts, str(folder / "b"), **settings)))
    reasons = {candidate["finish_reason"] for record in records for candidate in record["candidates"]}
    assert reasons == {"stop", "length"}
    return settings, answers(records)


def most_common_token(model, records):
    """An id that ends some of the answers and not all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = [set(tokenizer(answer["text"], add_special_tokens=False)["input_ids"]) for answer in flat(records)]
    counts = {token: sum(token in ids for ids in found) for ids in found for token in ids}
    return max((count, token) for token, count in counts.items() if count < len(found))[1]


def flat(records):
    return [candidate for record in records for candidate in record["candidates"]]


def answers(records):
    return [(c["text"], c["finish_reason"], c["num_tokens"]) for c in flat(records)]


def command(model, prompts, output_dir, **settings):
    words = [f"--{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in settings.items()]
    head = [sys.executable, "-m", "prefopt", "generate", "--model_name_or_path", model, "--prompts", prompts]
    return [*head, "--output_dir", str(output_dir), *words]


def offline(model, prompts, output_dir, **settings):
    started = time.monotonic()
    words = command(model, prompts, output_dir, backend="vllm", enforce_eager=True, max_model_len=512, **settings)
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=400)
    print(f"vLLM offline, {settings}: {time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stderr[-3000:]
    return read_records(output_dir)


def test_the_offline_engine_agrees_with_two_workers(model, prompts, expected, tmp_path):
    settings, wanted = expected
    assert answers(offline(model, prompts, tmp_path / "out", **settings, data_parallel_size=2)) == wanted
    manifest = read_json(tmp_path / "out" / "generate_shards" / "00002.json")
    assert manifest["settings"]["backend"] == "vllm"
    assert (tmp_path / "out" / "generate_shards" / "worker_1.out").stat().st_size > 0


def test_the_offline_engine_draws_by_seed(model, prompts, tmp_path):
    drawn = {"num_samples": 3, "max_new_tokens": 16, "dtype": "float32", "seed": 7}
    first = offline(model, prompts, tmp_path / "a", **drawn)
    assert all(len({c["text"] for c in record["candidates"]}) == 3 for record in first)


def test_the_server_agrees(model, prompts, expected, tmp_path):
    settings, wanted = expected
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    vllm = os.path.join(os.path.dirname(sys.executable), "vllm")
    words = [vllm, "serve", model, "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "512", "--served-model-name", "tiny", "--api-key", "sk-test"]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        try:
            wait_for(server, f"{base}/health", tmp_path / "server.log")
            print(f"vLLM server up after {time.monotonic() - started:.0f} s")
            os.environ["PREFOPT_TEST_KEY"] = "sk-test"
            args = {"backend": "server", "base_url": f"{base}/v1", "key_variable": "PREFOPT_TEST_KEY", **settings}
            records = read_records(run(GenerateArguments(model, prompts, str(tmp_path / "out"), **args)))
            assert answers(records) == wanted
            drawn = {**args, "num_samples": 3, "temperature": 0.7, "repetition_penalty": 1.1}
            again = [
                read_records(run(GenerateArguments(model, prompts, str(tmp_path / name), **drawn))) for name in "ab"
            ]
            assert again[0] == again[1]
            assert all(len({c["text"] for c in record["candidates"]}) > 1 for record in again[0])
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(server, address, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
