"""Templates made into one file that asks for nothing: Jinja2 escapes, plotly comes along whole."""

from __future__ import annotations

from typing import Any

from arkv_fx.errors import EvaluationError

MISSING = "pages need Jinja2 and plotly: pip install 'arkv-fx[report]'"


def require_templates() -> Any:
    """The module ``jinja2``.

    Raises:
        EvaluationError: if it is not installed.
    """
    try:
        import jinja2
    except ImportError as missing:
        raise EvaluationError(MISSING) from missing
    return jinja2


def render(template: str, **values: Any) -> str:
    """A page. Texts are escaped; what a template passes on as JSON holds no ``<``.

    Raises:
        EvaluationError: if Jinja2 is not installed.
    """
    jinja2 = require_templates()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("arkv_fx.evaluation.pages"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return str(environment.get_template(template).render(**values))


def plotly_script() -> str:
    """All of plotly.js.

    Raises:
        EvaluationError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as missing:
        raise EvaluationError(MISSING) from missing
    script = str(get_plotlyjs())
    if "</script" in script.lower() or "<!--" in script:  # it would end where it should not
        raise EvaluationError("this version of plotly.js cannot be part of a page: take another")
    return script
