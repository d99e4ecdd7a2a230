"""How the sites of all graphs of a model become the rows of one report."""

from __future__ import annotations

from dataclasses import replace

from pass_harness import ROOMY, cached, capture, lift, tensors

from arkv_fx.report import Report


def test_a_site_that_is_known_by_the_end_of_its_path_is_counted_once() -> None:
    """As where a graph break stands within a layer and another graph begins behind it."""
    (site,) = capture(cached(lift), *tensors(6)).context.sites
    layers = [replace(site, path=f"model.layers.{i}.self_attn", layer=i) for i in range(2)]
    ends = [replace(site, path="self_attn", layer=i) for i in range(2)]
    whole = Report.of([layers], ROOMY)
    assert whole.fused == 2
    for graphs in ([layers, ends], [ends, layers], [ends[:1], layers, ends[1:]]):
        report = Report.of(graphs, ROOMY)
        assert sorted(r["path"] for r in report.rows) == [s.path for s in layers]
        assert report.nbytes == whole.nbytes
    # Negative control: one that was not fused there is a finding of its own.
    left = replace(ends[0], reason="a reason")
    assert [r["fused"] for r in Report.of([layers, [left]], ROOMY).rows] == [True, True, False]
