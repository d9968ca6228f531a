"""Ctrl-C while a library loads is kept, and answered once that is over."""

import signal
import threading

import pytest

from lingc.cli.interrupts import held


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_comes_when_the_block_is_over(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    reached = []

    def work() -> None:
        with held():
            signal.raise_signal(number)
            reached.append(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)

    assert reached == [1]


def test_without_an_interrupt_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    with held():
        pass

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_error_in_the_block_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(ZeroDivisionError, match="mine"), held():
        raise ZeroDivisionError("mine")

    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_takes_no_interrupts_and_holds_none() -> None:
    reached = []

    def work() -> None:
        with held():
            reached.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert reached == [1]
