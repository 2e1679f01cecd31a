"""Tiny rankers and records for the tests of ranking and pair building."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefopt.candidates.rankers.base import Request
from prefopt.candidates.records import make_candidate, make_record
from prefopt.candidates.shards import Shard
from tests.tiny import tiny_tokenizer

PROMPTS = ["Name a colour.", [{"role": "user", "content": "What is two plus three?"}], "Grüße aus Köln: None?"]
ANSWERS = [
    ["Blue.", "Green is a colour too.", "x"],
    ["five", "The answer is five. " * 6],
    ["你好 世界", "None", "yes 🙂", "a" * 40],
]
REQUESTS = [Request(f"row{n}", prompt, answers) for n, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS))]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tally():
    return Shard(0, 0, [])


def spread(model):
    """Weights wide enough that answers get visibly different scores."""
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.3)
    return model.eval()


def save_reward_model(folder, *, labels=1, pad=0, seed=0, positions=512):
    """A Llama with a classification head, and its tokenizer."""
    tokenizer = tiny_tokenizer("llama3")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        num_labels=labels,
        pad_token_id=pad,
        max_position_embeddings=positions,
        **SHAPE,
    )
    torch.manual_seed(seed)
    model = spread(AutoModelForSequenceClassification.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def records(count=6, size=3):
    """Records of unscored candidates, some with awkward texts."""
    prompts = [
        "Name a colour.",
        "Say None, please: {prompt}",
        "Grüße 🙂",
        "<|eot_id|> is a token",
        "What is two plus three?",
    ]
    return [
        make_record(
            f"p{n}",
            f"{prompts[n % len(prompts)]} ({n})",
            [
                make_candidate(
                    f"answer {k} " + "blue " * ((n * 7 + k * 3) % 11), source="tiny", k=k, finish_reason="stop"
                )
                for k in range(size)
            ],
        )
        for n in range(count)
    ]


@contextmanager
def judge_server(decide):
    """A chat server whose reply to a question is `decide(question)`: a text, or an HTTP status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions" and body["model"] == "judge" and body["temperature"] == 0
            reply = decide(body["messages"][0]["content"])
            status = reply if isinstance(reply, int) else 200
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
