"""The files for operators hold together: schemas accept them, and every figure that they ask for exists."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import check_jsonschema
import promql_parser
import pytest
import typer.main
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hanse_common.directory import MAX_MEMBERS
from hanse_common.secagg.parameters import MAX_ROSTER
from hanse_server.cli import app
from hanse_server.config import Admin, AggregatorListener, Fleet, Page
from hanse_server.metrics import Metrics

if TYPE_CHECKING:
    from hanse_server.flower_link import SuperLink

SCRAPED = {"job", "instance"}
"""What Prometheus itself adds to every series."""


@pytest.fixture
def deploy(root: Path) -> Path:
    return root / "server" / "deploy"


@pytest.fixture
def compose(deploy: Path) -> dict[str, Any]:
    return read(deploy / "compose.yaml")


@pytest.fixture
def dashboard(deploy: Path) -> dict[str, Any]:
    return json.loads((deploy / "grafana" / "hanse.json").read_text())  # type: ignore[no-any-return]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def series(tmp_path: Path) -> dict[str, dict[str, set[str]]]:
    """The labels of each series that a server exposes, with the values that they may have."""
    found: dict[str, dict[str, set[str]]] = {"up": {}}
    exposed = Metrics(state=tmp_path).exposition().decode()
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def selectors(expression: str) -> Iterator[Any]:
    """Yield the selectors of a PromQL expression. Raises `ValueError` when it is none."""
    found: list[Any] = []
    parsed = promql_parser.parse(expression.replace("$__rate_interval", "1m"))

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)

    promql_parser.walk(parsed, visit)
    yield from {str(selector): selector for selector in found}.values()


def require_known(expression: str, series: dict[str, dict[str, set[str]]]) -> None:
    """Fail unless all that `expression` selects, sums by and matches exists."""
    labels = set(SCRAPED)
    for selector in selectors(expression):
        assert selector.name in series, f"{expression}: there is no {selector.name}"
        labels |= series[selector.name].keys()
        for matcher in selector.matchers.matchers:
            assert matcher.name in series[selector.name].keys() | SCRAPED, f"{expression}: {matcher.name}"
            if matcher.name in series[selector.name]:
                assert matcher.value in series[selector.name][matcher.name], f"{expression}: {matcher.value}"
    for grouping in re.findall(r"(?:by|without|on|ignoring) ?\(([^)]*)\)", expression):
        assert {label.strip() for label in grouping.split(",")} <= labels, f"{expression}: by {grouping}"


def alerts(deploy: Path) -> list[dict[str, Any]]:
    groups = read(deploy / "prometheus" / "alerts.yaml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [(panel["title"], target) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return found + [(note["name"], note["target"]) for note in dashboard["annotations"]["list"]]


def test_the_check_of_expressions_finds_what_is_wrong(series: dict[str, dict[str, set[str]]]) -> None:
    require_known('sum by (le, trip) (rate(hanse_trip_seconds_bucket{trip="upload"}[5m]))', series)
    for wrong in (
        "hanse_no_such_thing",
        "rate(hanse_rounds[5m])",
        "1 + (2 * hanse_round)",
        'hanse_trips_total{merchant="alder"}',
        'hanse_round_failures_total{reason="tired"}',
        "sum by (merchant) (hanse_trips_total)",
        "quantile(0.5, hanse_no_such_thing) or up",
    ):
        with pytest.raises(AssertionError):
            require_known(wrong, series)
    for broken in ("rate(up)", "sum by (trip) (hanse_trips_total", "up >"):
        with pytest.raises(ValueError, match=r"."):
            require_known(broken, series)


def test_every_alert_is_about_figures_that_exist(
    deploy: Path, series: dict[str, dict[str, set[str]]]
) -> None:
    rules = alerts(deploy)
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) > 8
    for rule in rules:
        require_known(rule["expr"], series)
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["description"].split()) > 5, "what to do"


def test_alerts_cover_what_an_operator_must_hear_of(deploy: Path) -> None:
    asked = {selector.name for rule in alerts(deploy) for selector in selectors(rule["expr"])}
    assert asked >= {
        "hanse_rounds_total",
        "hanse_round_failures_total",
        "hanse_round_dropouts_total",
        "hanse_round_sum_norm_bound",
        "hanse_certificate_end_timestamp_seconds",
        "hanse_directory_end_timestamp_seconds",
        "hanse_state_free_bytes",
        "up",
    }


def test_a_certificate_alerts_after_the_server_itself_has_warned(deploy: Path) -> None:
    from hanse_server.certificates import WARNING_DAYS

    expressions = [
        rule["expr"] for rule in alerts(deploy) if rule["alert"].startswith("HanseCertificateEnds")
    ]
    days = [int(re.search(r"< (\d+) \* 86400", expression)[1]) for expression in expressions]  # type: ignore[index]
    assert max(days) < max(WARNING_DAYS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "--syntax-only", "prometheus.yaml"),
        ("test", "rules", "alerts.test.yaml"),
    ],
)
def test_promtool_accepts_the_rules_and_they_fire_when_they_should(
    deploy: Path, arguments: tuple[str, ...]
) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=deploy / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_in_which_it_fires(deploy: Path) -> None:
    tests = (deploy / "prometheus" / "alerts.test.yaml").read_text()
    for rule in alerts(deploy):
        assert f'{{alertname="{rule["alert"]}"}}' in tests, rule["alert"]


def test_every_panel_shows_figures_that_exist(
    dashboard: dict[str, Any], series: dict[str, dict[str, set[str]]]
) -> None:
    shown = expressions(dashboard)
    assert len(shown) > 30
    for title, target in shown:
        require_known(target["expr"], series)
        assert 'instance=~"$instance"' in target["expr"], title


def test_every_figure_is_on_the_dashboard_or_in_an_alert(
    deploy: Path, dashboard: dict[str, Any], series: dict[str, dict[str, set[str]]]
) -> None:
    asked = [rule["expr"] for rule in alerts(deploy)] + [
        target["expr"] for _, target in expressions(dashboard)
    ]
    used = {re.sub("_(bucket|sum|count)$", "", found.name) for text in asked for found in selectors(text)}
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in series if name.startswith("hanse_")}
    not_shown = {"hanse_build_info", "hanse_blocks_total", "hanse_trips_total", "hanse_trip_seconds"}
    of_tables = {name for name in ours if name.endswith(("timestamp_seconds", "_version"))}
    assert ours - used <= not_shown | of_tables


def test_the_dashboard_is_laid_out_without_gaps_in_names_or_overlaps(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["title"] and panel["description"].endswith(".")
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_grafana_finds_its_data_source_and_its_dashboard(
    deploy: Path, dashboard: dict[str, Any], compose: dict[str, Any]
) -> None:
    provisioning = deploy / "grafana" / "provisioning"
    (source,) = read(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    places = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    places += [target for _, target in expressions(dashboard) if "datasource" in target]
    assert {place["datasource"]["uid"] for place in places} == {source["uid"]}
    prometheus = compose["services"]["prometheus"]["command"]
    listens = next(part for part in prometheus if part.startswith("--web.listen-address="))
    assert source["url"] == "http://" + listens.partition("=")[2]
    (provider,) = read(provisioning / "dashboards" / "hanse.yaml")["providers"]
    mounted = mounts(compose["services"]["grafana"])
    assert provider["options"]["path"] + "/hanse.json" in mounted
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """The sources of a service's volumes by target."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}


def test_compose_is_by_its_schema(deploy: Path) -> None:
    check = check_jsonschema.main
    arguments = ["--builtin-schema", "vendor.compose-spec", str(deploy / "compose.yaml")]
    assert check(arguments, standalone_mode=False) in (None, 0)


def test_a_compose_file_that_is_not_by_the_schema_is_noticed(compose: dict[str, Any], tmp_path: Path) -> None:
    compose["services"]["server"]["restarts"] = "always"
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(yaml.safe_dump(compose))
    with pytest.raises(SystemExit) as exit_:
        check_jsonschema.main(["--builtin-schema", "vendor.compose-spec", str(wrong)])
    assert exit_.value.code == 1


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="there is no docker compose here",
)
def test_docker_compose_reads_it(deploy: Path) -> None:
    done = subprocess.run(
        ["docker", "compose", "--file", deploy / "compose.yaml", "config", "--quiet"],
        env={
            "HANSE_DATABASE_PASSWORD": "x",
            "HANSE_GRAFANA_PASSWORD": "y",
            "PATH": "/usr/bin:/usr/local/bin",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_compose_mounts_from_here_is_here_or_the_operators_to_make(
    deploy: Path, compose: dict[str, Any]
) -> None:
    header = (deploy / "compose.yaml").read_text().partition("name: hanse")[0]
    for service in compose["services"].values():
        for source in mounts(service).values():
            if source.startswith("./"):
                made = source.split("/")[1]
                assert (deploy / source).exists() or made in header, source
            else:
                assert source in compose["volumes"], source
    assert (deploy / compose["services"]["server"]["build"]["context"] / "pyproject.toml").is_file()


def test_nothing_but_the_merchants_ports_is_open_to_others(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for port in services["postgres"]["ports"]:
        assert port.startswith("127.0.0.1:")
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    others = [service for name, service in services.items() if name != "postgres"]
    assert all(service["network_mode"] == "host" and "ports" not in service for service in others)
    for name, service in services.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("cap_drop") == ["ALL"] or name == "postgres"


def test_images_are_pinned_and_no_secret_is_written_down(deploy: Path, compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name != "server":
            assert re.fullmatch(r"[a-z/]+:v?\d+[\d.]*", service["image"])
        for key, value in service.get("environment", {}).items():
            if "PASSWORD" in key:
                assert re.fullmatch(r"\$\{HANSE_[A-Z_]+:\?write it in \.env\}", value)


def test_prometheus_asks_where_the_page_listens(deploy: Path, compose: dict[str, Any]) -> None:
    configuration = read(deploy / "prometheus" / "prometheus.yaml")
    (job,) = configuration["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{Page().port}"]}]
    assert (job["job_name"], job.get("scheme", "http"), job["metrics_path"]) == ("hanse", "http", "/metrics")
    mounted = mounts(compose["services"]["prometheus"])
    assert job["authorization"]["credentials_file"] in mounted
    assert all(f"/etc/prometheus/{file}" in mounted for file in configuration["rule_files"])


def test_ports_are_the_configurations_defaults(deploy: Path) -> None:
    header = (deploy / "compose.yaml").read_text().partition("name: hanse")[0]
    image = (deploy / "Dockerfile").read_text()
    fleet, aggregator = Fleet().port, AggregatorListener.model_fields["port"].default
    assert f"EXPOSE {fleet} {aggregator}" in image
    assert f"ports {fleet} and {aggregator}" in header
    assert f"page ({Page().port})" in header
    assert f"commands ({Admin.model_fields['port'].default})" in header
    assert f":{fleet}/health" in image


def test_the_image_installs_what_is_locked_and_runs_without_rights(root: Path, deploy: Path) -> None:
    image = (deploy / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", image, re.M):
        assert all((root / name).exists() for name in source.split()), source
    extras = re.search(r'-c requirements\.lock "\.\[([a-z,]+)\]"', image)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert extras and set(extras[1].split(",")) <= project["project"]["optional-dependencies"].keys()
    last = image.rpartition("FROM ")[2]
    assert last.index("USER hanse") < last.index("ENTRYPOINT")


def test_the_images_health_check_tells_a_server_that_answers_from_one_that_does_not(
    deploy: Path, link: "SuperLink"
) -> None:
    found = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", (deploy / "Dockerfile").read_text(), re.M)
    assert found
    program, *arguments = json.loads(found[1])
    assert program == "python"

    def healthy(port: int) -> bool:
        asked = [text.replace(f":{Fleet().port}/", f":{port}/") for text in arguments]
        done = subprocess.run([sys.executable, *asked], capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    assert healthy(link.fleet_port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert not healthy(taken.getsockname()[1])


def test_the_scaling_plan_speaks_of_the_limits_that_there_are(root: Path) -> None:
    plan = (root / "server" / "SCALING.md").read_text()
    assert f"up to {MAX_ROSTER} merchants, a directory of up to {MAX_MEMBERS}" in plan
    assert f"K cohorts of at most {MAX_ROSTER}" in " ".join(plan.split())
    for target in re.findall(r"\]\(([^)#:]+)\)", plan):
        assert (root / "server" / target).exists(), target
    for module in re.findall(r"`(hanse_[a-z_.]+)`", plan):
        if not module.endswith("_total"):
            assert importlib.util.find_spec(module), module


def commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_unit_and_image_call_a_command_that_exists(deploy: Path) -> None:
    unit = (deploy / "hanse-server.service").read_text()
    called = re.search(r"^ExecStart=\S+/hanse-server ([a-z-]+) ", unit, re.M)
    assert called and called[1] in commands()
    cmd = re.search(r'^CMD \["([a-z-]+)"\]$', (deploy / "Dockerfile").read_text(), re.M)
    assert cmd and cmd[1] in commands()


def test_the_unit_lets_the_server_write_its_state_alone(deploy: Path) -> None:
    unit = (deploy / "hanse-server.service").read_text()
    for line in (
        "User=hanse",
        "ReadOnlyPaths=/srv/hanse",
        "ReadWritePaths=/srv/hanse/state",
        "ProtectSystem=strict",
        "NoNewPrivileges=true",
        "CapabilityBoundingSet=",
    ):
        assert f"\n{line}\n" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_understands_the_unit_and_finds_it_shut(deploy: Path, tmp_path: Path) -> None:
    text = (deploy / "hanse-server.service").read_text()
    path = tmp_path / "hanse-server.service"
    path.write_text(text.replace("/opt/hanse/.venv/bin/hanse-server", "/bin/true"))

    def analyze(*arguments: str) -> str:
        done = subprocess.run(
            ["systemd-analyze", *arguments, path], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    said = [line for line in analyze("verify", "--man=no").splitlines() if "hanse-server" in line]
    assert not said, said
    level = re.search(
        r"exposure level for hanse-server\.service: ([\d.]+)", analyze("security", "--offline=true")
    )
    assert level is None or float(level[1]) <= 2.5, "0 is shut, 10 is open"
