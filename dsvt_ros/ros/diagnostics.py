"""The node's state as diagnostic_msgs (REP 107)."""

from __future__ import annotations

from collections.abc import Mapping

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from dsvt_ros.ros.counters import Report, percentile
from dsvt_ros.ros.node_config import DiagnosticsConfig

STAMP_OF_ANOTHER_CLOCK_MS = 3.6e6
"""Latencies beyond an hour, or negative ones, come from stamps of another clock, as in a replayed bag."""


def status_from_report(
    report: Report,
    limits: DiagnosticsConfig,
    *,
    name: str,
    state: str,
    preparation: str,
    num_publishers: int,
    motion_problem: str,
    facts: Mapping[str, str],
) -> DiagnosticStatus:
    """What the node did since the last report, and whether that is well.

    Args:
        report: Counts and times.
        limits: When to warn.
        name: Node and component.
        state: Of the lifecycle, such as active.
        preparation: What keeps it from being active, such as building an engine; empty if nothing does.
        num_publishers: On the input topic.
        motion_problem: Why sweeps of the last cloud were left out or not compensated; empty if all is well.
        facts: Shown as they are, such as model and device.
    """
    level, message = _judge(report, limits, preparation or state, num_publishers, motion_problem)
    values = {
        "state": state,
        **facts,
        "publishers on the input": str(num_publishers),
        "rate": f"{report.rate_hz:.1f} Hz",
        "processing p50": _milliseconds(report.processing_ms, 50),
        "processing p95": _milliseconds(report.processing_ms, 95),
        "latency p50": _latency(report.latency_ms, 50),
        "latency p95": _latency(report.latency_ms, 95),
        "clouds received": str(report.counts.received),
        "clouds answered": str(report.counts.answered),
        "clouds dropped": str(report.counts.dropped),
        "clouds refused": str(report.counts.refused),
        "clouds failed": str(report.counts.failed),
        "last error": report.last_error,
    }
    return DiagnosticStatus(
        level=level,
        name=name,
        message=message,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )


def _judge(
    report: Report, limits: DiagnosticsConfig, state: str, num_publishers: int, motion_problem: str
) -> tuple[bytes, str]:
    if report.recent.refused or report.recent.failed:
        return DiagnosticStatus.ERROR, report.last_error
    if state != "active":
        return DiagnosticStatus.OK, state
    if report.since_cloud_s is None or report.since_cloud_s > limits.max_input_gap_s:
        if num_publishers == 0:
            return DiagnosticStatus.WARN, "no clouds: nobody publishes on the input topic"
        return DiagnosticStatus.WARN, (
            "no clouds: there is a publisher but nothing arrives; check that its QoS fits "
            "qos.reliability, and for large clouds its transport and net.core.rmem_max"
        )
    p95 = percentile(report.processing_ms, 95)
    if p95 > limits.max_allowed_processing_time_ms:
        return DiagnosticStatus.WARN, (
            f"slow: processing p95 {p95:.0f} ms, allowed "
            f"{limits.max_allowed_processing_time_ms:.0f} ms; "
            f"{report.recent.dropped} clouds dropped"
        )
    if motion_problem:
        return DiagnosticStatus.WARN, motion_problem
    return DiagnosticStatus.OK, f"{report.rate_hz:.1f} Hz"


def _milliseconds(values: tuple[float, ...], percent: float) -> str:
    return f"{percentile(values, percent):.1f} ms" if values else "none"


def _latency(values: tuple[float, ...], percent: float) -> str:
    if values and not 0 <= percentile(values, 50) < STAMP_OF_ANOTHER_CLOCK_MS:
        return "unknown: the clouds' stamps are not of this clock"
    return _milliseconds(values, percent)
