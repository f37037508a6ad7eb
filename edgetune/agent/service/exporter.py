"""The numbers of an agent for Prometheus, at ``http://HOST:PORT/metrics``; loopback unless somebody says otherwise.

The library (extra ``metrics``) is imported when an endpoint is wanted, and takes 5 to 6 MiB, which the runtime's figure
counts then (``agent/baseline.py``). Answers come from threads of their own, so a long step does not hold them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgetune.agent.service.numbers import Family, Numbers
from edgetune.errors import UsageError


class Exporter:
    """Serves ``numbers`` until :meth:`close`. ``port``: the one it listens on.

    Raises:
        UsageError: the library is not installed. OSError: nobody can listen there.
    """

    def __init__(self, numbers: Numbers, host: str, port: int, info: dict[str, str] | None = None) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise UsageError(
                "service.metrics_port needs the package prometheus-client; install edgetune[metrics], or leave the "
                "setting away"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(numbers, info or {}))
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    def __init__(self, numbers: Numbers, info: dict[str, str]) -> None:
        self._numbers, self._info = numbers, info

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import InfoMetricFamily

        if self._info:
            yield InfoMetricFamily("edgetune", "What runs.", value=self._info)
        for family in self._numbers.families():
            yield _metric(family)


def _metric(family: Family) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    made = kind(f"edgetune_{family.name}", family.help, labels=[] if family.label is None else [family.label])
    for label, value in family.values.items():
        made.add_metric([] if family.label is None else [label], value)
    return made
