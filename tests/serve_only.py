"""Answer JPEG, DICOM and NIfTI from the web app's requirements alone: python tests/serve_only.py"""

import importlib.util
import json
import tempfile

from phantoms import deep, dicom, encode, make_app, phantom, sender, served, volume, web

FILES = {
    "JPEG": encode(phantom(1, lesion=True), "JPEG"),
    "TIFF": encode(phantom(1, lesion=True), "TIFF"),
    "DICOM": dicom(deep(1)),
    "NIfTI": volume((40, 40, 12), (1, 1, 5)),
}


def main():
    for name in ("tensorflow", "keras", "distributed", "pytest"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed here"
    with tempfile.TemporaryDirectory() as folder, served(make_app(folder)) as port:
        for kind, data in FILES.items():
            result = json.loads(sender(f"http://127.0.0.1:{port}/upload", data)())
            assert result["status"] == "done" and result["scans"], result
            assert all(scan["verdict"] != "rejected" for scan in result["scans"]), result
            print(f"{kind}: {len(result['scans'])} answered by {web.__name__}.py")


if __name__ == "__main__":
    main()
