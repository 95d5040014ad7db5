"""demo/: the shipped questions are those that demo/make_data.py makes."""

import json

from helpers import ROOT

from demo.make_data import DEV_PASSAGES, SEED, make_document


def test_the_shipped_questions_are_what_the_script_writes():
    shipped = (ROOT / "demo/dev.json").read_text("utf-8")
    assert json.dumps(make_document("dev", DEV_PASSAGES, SEED), ensure_ascii=False) + "\n" == shipped
