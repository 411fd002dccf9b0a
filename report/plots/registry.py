"""The figures by letter: A to H, then those of the sections on failures, time and the machine."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from report.plots import (
    a_stability_matrix,
    b_efficiency_frontier,
    c_throughput,
    d_grad_norm_heartbeat,
    e_logit_magnitude,
    f_padding_tax,
    g_loss_scale_inversion,
    h_rank_correlation,
    hardware,
    headroom,
    kernel_time,
    overhead,
    step_times,
)

DRAW: dict[str, Callable[..., Figure]] = {
    "A": a_stability_matrix.draw,
    "B": b_efficiency_frontier.draw,
    "C": c_throughput.draw,
    "D": d_grad_norm_heartbeat.draw,
    "E": e_logit_magnitude.draw,
    "F": f_padding_tax.draw,
    "G": g_loss_scale_inversion.draw,
    "H": h_rank_correlation.draw,
    "headroom": headroom.draw,
    "hardware": hardware.draw,
    "step_times": step_times.draw,
    "kernel_time": kernel_time.draw,
    "overhead": overhead.draw,
}
