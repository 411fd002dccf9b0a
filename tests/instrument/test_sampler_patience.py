"""What answers too late is dropped, and the thread that was stuck in it does nothing more."""

import threading
import time

from instrument.sampler.gpu import Patience


def test_a_call_that_answers_late_is_dropped_and_its_late_answer_is_not_used():
    patience = Patience(wait_s=0.1, limit_s=0.15)
    release = threading.Event()
    slow = {"slow": lambda: release.wait() and "old", "quick": lambda: "now"}
    assert patience.ask(slow)[0] == {}
    time.sleep(0.06)
    release.set()
    time.sleep(0.02)
    answers, reasons = patience.ask(slow)
    assert answers == {"quick": "now"} and "not asked again" in reasons["slow"]


def test_a_thread_that_was_replaced_asks_nothing_more():
    patience = Patience(wait_s=0.1, limit_s=0.15)
    release, asked = threading.Event(), []
    questions = {"stuck": release.wait, "next": lambda: asked.append(threading.current_thread())}
    patience.ask(questions)
    time.sleep(0.06)
    patience.ask(questions)  # gives up, on a new thread
    release.set()
    time.sleep(0.05)
    assert len(asked) == 1
