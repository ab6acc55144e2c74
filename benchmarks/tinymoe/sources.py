"""Where the corpus comes from: Debian packages, the files read from each, and their licences.

The licence is the one `debian/copyright` of the package states for the files read here. All packages are in
Debian's `main` archive, so every text is free by the Debian Free Software Guidelines.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAINS = ("en", "de", "fr", "es", "py", "cpp", "sh", "json", "math", "old")

#: Share of the training tokens. The five domains that the first model knew too carry the larger part; English, the most
#: varied of them, most.
WEIGHTS = {
    "en": 0.22, "de": 0.17, "fr": 0.12, "es": 0.05, "py": 0.15,
    "cpp": 0.13, "sh": 0.04, "json": 0.04, "math": 0.04, "old": 0.04,
}  # fmt: skip

#: At most so many characters of training text per domain; larger sources are sampled by document.
MAX_CHARS = {
    "en": 10_000_000, "de": 9_000_000, "fr": 9_000_000, "es": 5_000_000, "py": 12_000_000,
    "cpp": 10_000_000, "sh": 5_000_000, "json": 5_000_000, "math": 5_000_000, "old": 5_000_000,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Files of one Debian package that feed one domain.

    `reader` names a function of `tinymoe.readers`; `patterns` are globs under the unpacked package.
    `embed` says whether its documents may become embedded (shipped) texts: collections of quotations whose
    single authors are not named by the package only train.
    """

    package: str
    domain: str
    reader: str
    patterns: tuple[str, ...]
    licence: str
    embed: bool = True

    @property
    def one_document_per_piece(self) -> bool:
        """A whole book or collection in one file: its chapters count as documents. Else the file is one."""
        return self.reader in ("metamath", "kjv", "dictd", "fortunes")


_HANDBOOK = "usr/share/doc/debian-handbook/html"
_MAN = "usr/share/man/{}/man*/*.gz"

SOURCES = (
    Source("debian-handbook", "en", "html", (f"{_HANDBOOK}/en-US/*.html",), "GPL-2+ or CC-BY-SA-3.0"),
    Source("debian-handbook", "de", "html", (f"{_HANDBOOK}/de-DE/*.html",), "GPL-2+ or CC-BY-SA-3.0"),
    Source("debian-handbook", "fr", "html", (f"{_HANDBOOK}/fr-FR/*.html",), "GPL-2+ or CC-BY-SA-3.0"),
    Source("debian-handbook", "es", "html", (f"{_HANDBOOK}/es-ES/*.html",), "GPL-2+ or CC-BY-SA-3.0"),
    Source("debian-reference-en", "en", "html", ("usr/share/debian-reference/*.html",), "GPL-2+"),
    Source("debian-reference-de", "de", "html", ("usr/share/debian-reference/*.html",), "GPL-2+"),
    Source("perl-doc", "en", "pod", ("usr/share/perl/*/pod/*.pod",), "GPL-1+ or Artistic"),
    Source("git-doc", "en", "plain", ("usr/share/doc/git-doc/*.txt",), "GPL-2"),
    Source("fortunes", "en", "fortunes", ("usr/share/games/fortunes/*",), "BSD-3-clause (collection)", False),
    Source("fortunes-min", "en", "fortunes", ("usr/share/games/fortunes/*",), "BSD-3-clause (collection)", False),
    Source("manpages-de", "de", "man", (_MAN.format("de"),), "GPL-3+"),
    Source("manpages-de-dev", "de", "man", (_MAN.format("de"),), "GPL-3+"),
    Source("fortunes-de", "de", "fortunes", ("usr/share/games/fortunes/de/*",), "GPL-2+", False),
    Source("manpages-fr", "fr", "man", (_MAN.format("fr"),), "GPL-3+"),
    Source("manpages-fr-dev", "fr", "man", (_MAN.format("fr"),), "GPL-3+"),
    Source("manpages-es", "es", "man", (_MAN.format("es"),), "GPL-3+"),
    Source("fortunes-es", "es", "fortunes", ("usr/share/games/fortunes/es/*",), "GPL-2+", False),
    Source("libpython3.11-stdlib", "py", "code", ("usr/lib/python3.11/**/*.py",), "PSF-2"),
    Source("python3-django", "py", "code", ("usr/lib/python3/dist-packages/django/**/*.py",), "BSD-3-clause"),
    Source("python3-sympy", "py", "code", ("usr/lib/python3/dist-packages/sympy/**/*.py",), "BSD-3-clause"),
    Source("libboost1.74-dev", "cpp", "code", ("usr/include/boost/**/*.hpp",), "BSL-1.0"),
    Source("libeigen3-dev", "cpp", "code", ("usr/include/eigen3/Eigen/src/**/*.h",), "MPL-2.0"),
    Source("bash-completion", "sh", "code", ("usr/share/bash-completion/completions/*",), "GPL-2+"),
    Source("zsh-common", "sh", "code", ("usr/share/zsh/functions/**/*",), "Zsh (MIT-like)"),
    Source("testssl.sh", "sh", "code", ("usr/bin/testssl",), "GPL-2"),
    Source("lynis", "sh", "code", ("usr/share/lynis/include/*",), "GPL-3"),
    Source(
        "python3-botocore",
        "json",
        "json",
        ("usr/lib/python3/dist-packages/botocore/data/*/*/service-2.json",),
        "Apache-2.0",
    ),
    Source("iso-codes", "json", "json", ("usr/share/iso-codes/json/*.json",), "LGPL-2.1+"),
    Source("metamath-databases", "math", "metamath", ("usr/share/metamath/databases/set.mm",), "CC0-1.0"),
    Source("bible-kjv-text", "old", "kjv", ("usr/lib/bible.data",), "public domain (1611)"),
    Source("dict-devil", "old", "dictd", ("usr/share/dictd/devil.dict.dz",), "public domain (1911)"),
)

#: Packages unpacked only for a tool in them: bible.data is compressed and `bible` prints it.
TOOLS = ("bible-kjv",)


def packages() -> list[str]:
    """Every Debian package to download, each once, in a stable order."""
    return list(dict.fromkeys([s.package for s in SOURCES] + list(TOOLS)))
