"""Text of unknown origin in pages: shown literally, never acted on."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.trainer_utils import SchedulerType

from prefopt.data import TokenizationReport
from prefopt.pages import escape, picture, printable, table
from prefopt.trainers.model_card import write_model_card


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("![x](https://evil/p.png)", r"!\[x\](https&#58;//evil/p.png)"),
        ("[link][ref]", r"\[link\]\[ref\]"),
        ("a | b\n| --- |", r"a \| b \| --- \|"),
        ("`code` *a* _b_ ~c~ $d$ \\", r"\`code\` \*a\* \_b\_ \~c\~ \$d\$ \\"),
        ("&lt;img src=x&gt;", "&amp;lt;img src=x&amp;gt;"),
        ("see www.evil.com and HTTP://evil", "see www&#46;evil.com and HTTP&#58;//evil"),
        ("\x1b[31mred\x07\x9b", "\ufffd\\[31mred\ufffd\ufffd"),
        ("a\u202etxt.exe\u2066 \ud800", "a\ufffdtxt.exe\ufffd \ufffd"),
        ("best_worst _em_", r"best_worst \_em\_"),
        ("naïve 你好 🙂 3 > 2", "naïve 你好 🙂 3 &gt; 2"),
    ],
)
def test_escape_shows_text_literally(text, shown):
    assert escape(text) == shown
    shown.encode("utf-8")


def test_printable_keeps_lines_and_joined_emoji():
    family = "👩\u200d👩\u200d👧"
    assert printable(f"a\tb\nc {family}") == f"a\tb\nc {family}"
    assert printable("\x1b]0;title\x07\r\x00\u2028") == "\ufffd]0;title\ufffd\ufffd\ufffd\ufffd"


def test_a_picture_keeps_its_path_inside_the_link():
    assert picture("p", "a (1)/b.png") == "![p](a%20%281%29/b.png)"


def test_table():
    assert table(("a", "b"), [("x", 1), ("", 2)]) == ["| a | b |", "| --- | --- |", "| x | 1 |", "| | 2 |"]


HOSTILE = "<u>![z](https://evil/z.png)"


@dataclass
class Settings:
    output_dir: str
    loss_type: str = "<b>![x](https://evil/x.png)</b>"
    hub_model_id: str | None = None
    lr_scheduler_type: SchedulerType = SchedulerType.COSINE
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot change


def test_a_model_card_shows_names_and_values_literally(tmp_path):
    config = LlamaConfig(name_or_path="base`<i>![y](https://evil/y.png)")
    trainer = SimpleNamespace(
        args=Settings(str(tmp_path)),
        model=SimpleNamespace(config=config),
        state=SimpleNamespace(log_history=[{"step": 3, "loss": 0.5}, {"step": 3, f"eval_{HOSTILE}": 1.0}]),
        tokenization_reports={HOSTILE: TokenizationReport(HOSTILE, 4, 3, {"empty": 1})},
        processing_class=SimpleNamespace(chat_template=None),
        _name="DPO",
        _paper={},
        _tag_names=("prefopt",),
    )
    write_model_card(trainer, model_name="<script>x</script>", dataset_name=None, tags=None, folder=tmp_path)
    body = (tmp_path / "README.md").read_text().split("---", 2)[2]
    assert "<script>" not in body and "<b>" not in body and "<i>" not in body and "![" not in body
    assert "<u>" not in body and "| loss | 0.5 |" in body and "| 4 | 3 | 1 | 0 |" in body
    assert "| lr_scheduler_type | cosine |" in body and "1 x CPU, " in body
    assert "# &lt;script&gt;x&lt;/script&gt;" in body and "evil" in body
