"""`preble-jax plot`: draws what `preble-jax sim` and `preble-jax sim sweep` have written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preble_jax.errors import InvalidRequestError

if TYPE_CHECKING:
    from preble_jax.sim.plots import Panel


def run_plot(arguments: argparse.Namespace) -> int:
    """Exit status 0. Raises ConfigError without matplotlib, InvalidRequestError for files that are not of `sim`."""
    from preble_jax.sim.panels import METRICS, ablation_panels, rate_panels
    from preble_jax.sim.plots import draw, require_plotting

    require_plotting(arguments.output)
    metrics = arguments.metric.split(",") if arguments.metric else METRICS
    if arguments.kind == "service":
        panels = _service_panels(arguments.files)
    else:
        rows = _rows(arguments.files)
        panels = rate_panels(rows, metrics) if arguments.kind == "rate" else ablation_panels(rows, metrics)
    if not panels:
        raise InvalidRequestError(f"expected runs to draw, got none in {', '.join(map(str, arguments.files))}")
    draw(panels, arguments.output, title=arguments.title)
    return 0


def _rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Of sweeps' files and of single runs' files; probes of a capacity are no runs."""
    from preble_jax.sim.sweep import read_rows

    rows: list[dict[str, Any]] = []
    for path in paths:
        document = _document(path)
        if document is None:
            rows += [row for row in read_rows(path) if "target" not in row]
        else:
            rows.append({**_labels(path, document), "summary": document["summary"]})
    return rows


def _document(path: Path) -> dict[str, Any] | None:
    """What `sim --json` wrote; None for anything else that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path}: expected a file of `preble-jax sim`, cannot read it ({error})") from error
    try:
        document = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(document, dict) and {"settings", "requests"} <= document.keys()
    return document if whole and isinstance(document.get("summary"), dict) else None


def _labels(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """As the rows of a sweep have them."""
    from preble_jax.sim.labels import labels_of

    try:
        return labels_of(document["settings"])
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path}: {error}") from error


def _service_panels(paths: Sequence[Path]) -> list[Panel]:
    """One a file, under a title that tells it from the others."""
    from preble_jax.sim.labels import distinctions
    from preble_jax.sim.panels import beside, service_panel

    documents = [_service_document(path) for path in paths]
    rows = [_labels(path, document) for path, document in zip(paths, documents, strict=True)]
    known = ("workload", "placement", "queue")
    for row in rows:
        row["settings"] = {key: row[key] for key in ("rate", "groups", "seed")} | row["settings"]
    titles = [
        beside(f"{row['workload']}, {row['placement']} + {row['queue']}", others)
        for row, others in zip(rows, distinctions(rows, known), strict=True)
    ]
    services = [document["service"] for document in documents]
    return [
        service_panel(title, service["times_s"], service["tenants"])
        for title, service in zip(titles, services, strict=True)
    ]


def _service_document(path: Path) -> dict[str, Any]:
    document = _document(path)
    if document is None or "service" not in document:
        raise InvalidRequestError(f"{path}: expected what `preble-jax sim --json` writes, got something else")
    return document
