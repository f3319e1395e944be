"""The checks of engines that need no container engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent


def command(name: str) -> str:
    """Return a tool of the environment or of the system; skip without it."""
    found = shutil.which(name, path=f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_dockerfile_is_clean() -> None:
    run(command("hadolint"), DEPLOY / "Dockerfile")


def test_the_image_writes_nothing_as_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").splitlines()
    last_stage = max(i for i, line in enumerate(lines) if line.startswith("FROM "))
    users = [line.split()[1] for line in lines[last_stage:] if line.startswith("USER ")]

    assert users == ["10001:10001"]


def test_compose_file_follows_its_schema() -> None:
    run(
        command("check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        DEPLOY / "compose.yaml",
    )


def test_every_container_of_ours_has_a_read_only_root() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    ours = compose["services"]["huying"]

    assert ours["read_only"] is True
    assert ours["cap_drop"] == ["ALL"]


def test_the_example_has_every_variable_that_compose_needs() -> None:
    text = (DEPLOY / "compose.yaml").read_text("utf-8")
    example = (DEPLOY / "example.env").read_text("utf-8")
    wanted = {part.split(":")[0].split("}")[0] for part in text.split("${")[1:]}
    given = {line.split("=")[0] for line in example.splitlines() if "=" in line}

    assert wanted == given


def test_yaml_is_clean() -> None:
    rules = (
        "{extends: default, rules: {document-start: disable, line-length: {max: 120}}}"
    )
    run(command("yamllint"), "-s", "-d", rules, DEPLOY)


def test_scripts_are_clean() -> None:
    scripts = [ROOT / ".ci" / "run", *ROOT.glob("tests/**/*.sh")]

    run(command("shellcheck"), *scripts)


def test_manifests_are_valid(tmp_path: Path) -> None:
    built = tmp_path / "all.yaml"
    built.write_text(
        run(command("kubectl"), "kustomize", DEPLOY / "kustomize" / "base"), "utf-8"
    )

    run(command("kubernetes-validate"), "--strict", built)


def test_the_pod_runs_without_rights() -> None:
    path = DEPLOY / "kustomize" / "base" / "statefulset.yaml"
    pod = yaml.safe_load(path.read_text("utf-8"))["spec"]["template"]["spec"]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_systemd_unit_is_valid_and_confined(tmp_path: Path) -> None:
    unit = tmp_path / "huying.service"
    text = (DEPLOY / "systemd" / "huying.service").read_text("utf-8")
    unit.write_text(
        text.replace("/opt/huying/bin/huying", str(BIN / "huying")), "utf-8"
    )
    analyze = command("systemd-analyze")

    run(analyze, "verify", "--man=no", unit)
    run(analyze, "security", "--offline=true", "--threshold=20", unit)


def test_nginx_accepts_the_example(tmp_path: Path) -> None:
    nginx = command("nginx")
    for name in ("web.pem", "web.key"):
        assert f"/etc/huying/tls/{name}" in text_of_example()
    run(
        command("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes",
        "-subj", "/CN=pacs.example.org", "-days", "2",
        "-keyout", tmp_path / "web.key", "-out", tmp_path / "web.pem",
    )  # fmt: skip
    site = tmp_path / "huying.conf"
    site.write_text(
        text_of_example().replace("/etc/huying/tls", str(tmp_path)), "utf-8"
    )
    whole = tmp_path / "nginx.conf"
    whole.write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{ access_log off; include {site}; }}\n",
        "utf-8",
    )

    run(nginx, "-t", "-c", whole, "-p", tmp_path)


def text_of_example() -> str:
    return (DEPLOY / "nginx" / "huying.conf").read_text("utf-8")
