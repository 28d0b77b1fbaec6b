"""Triton's own compile and launch path without a GPU: launches go to the PTX machine."""

from ptx.driver.device import Launch, Launches, driver, recorded

__all__ = ["Launch", "Launches", "driver", "recorded"]
