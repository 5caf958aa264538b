"""Known vulnerabilities among what this environment has installed, as pip-audit's advisory service knows them.

Ends with 1 where one is found. Where the service cannot be reached nothing is known: that is said, and is no failure.

    python -m bench.audit
"""

import json
import subprocess
import sys

DEADLINE_S = 300
_OFFLINE = ("ServiceError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "SSLError", "HTTPError")


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json", "--skip-editable"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"audit: the advisory service did not answer within {DEADLINE_S} s: nothing is known", file=sys.stderr)
        return 0
    return judge(ran.returncode, ran.stdout, ran.stderr)


def judge(code: int, said: str, errors: str) -> int:
    """The exit code for what pip-audit answered, told in words."""
    try:
        packages = json.loads(said)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(word in errors for word in _OFFLINE):
            print("audit: the advisory service cannot be reached: nothing is known", file=sys.stderr)
            return 0
        print(f"audit: pip-audit failed ({code}):\n{errors[-2000:]}", file=sys.stderr)
        return 1
    found = [(package, flaw) for package in packages for flaw in package.get("vulns", ())]
    for package, flaw in found:
        fixed = ", ".join(flaw.get("fix_versions", ())) or "no version yet"
        print(f"audit: {package['name']} {package['version']}: {flaw['id']}: fixed in {fixed}", file=sys.stderr)
    print(f"audit: {len(packages)} packages, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
