# SPDX-License-Identifier: Apache-2.0
"""Questions as somebody asks them, and which names answer them.

An answer is counted where its name begins with one of those given. All are of Python's standard
library and of packages that the demo needs, so that they can be found wherever it runs; what else
is installed may answer as well.
"""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "open a gzip file for writing": ("gzip.",),
    "parse json from a string": ("json.",),
    "find all files that match a pattern": ("glob.", "pathlib.", "fnmatch."),
    "inverse of a matrix": ("numpy.linalg.", "numpy.matrix", "torch.linalg.", "torch.", "scipy."),
    "delete a directory and everything in it": ("shutil.rmtree",),
    "copy a file together with its permissions": ("shutil.copy",),
    "run a command and capture what it prints": ("subprocess.",),
    "measure how long a small piece of code takes": ("timeit", "time.perf_counter"),
    "read rows of a csv file as dictionaries": ("csv.",),
    "shuffle a list in place": ("random.",),
    "count how often each element occurs": ("collections.Counter",),
    "remember the results of a function call": ("functools.",),
    "difference between two lists of lines": ("difflib",),
    "send an email through a server": ("smtplib", "email."),
    "download a web page": ("urllib.", "http.client", "requests"),
    "extract members of a zip archive": ("zipfile.",),
    "split a string like the shell does": ("shlex.",),
    "binary search in a sorted list": ("bisect",),
    "smallest items of an iterable": ("heapq.",),
    "temporary directory that is removed afterwards": ("tempfile.",),
    "hash of a string with sha256": ("hashlib.", "hmac."),
    "encode bytes as base64 text": ("base64.", "binascii."),
    "wrap text to a given width": ("textwrap.",),
    "parse command line arguments": ("argparse", "optparse", "getopt"),
    "convert a date to a string in iso format": ("datetime.",),
    "all permutations of a sequence": ("itertools.",),
    "write log messages to a rotating file": ("logging.",),
    "wait for several coroutines": ("asyncio.",),
    "thread that holds a lock": ("threading.", "_thread"),
    "greatest common divisor": ("math.gcd", "fractions.", "numpy.gcd"),
    "standard deviation of a sample": ("statistics.", "numpy.std", "torch.std"),
    "escape special characters in html": ("html.",),
    "compare two floats for near equality": ("math.isclose", "numpy.isclose", "torch.isclose"),
    "pretty print a nested dictionary": ("pprint",),
    "unpack binary data into integers": ("struct.",),
    "replace text by a regular expression": ("re.",),
    "singular value decomposition": ("numpy.linalg.svd", "torch.", "scipy.", "sklearn."),
    "solve a linear system of equations": ("numpy.linalg.", "torch.linalg.", "scipy."),
    "gradient of a tensor": ("torch.", "numpy.gradient"),
    "sort an array and return the indices": ("numpy.", "torch."),
}
# Words of which the names of the first five answers have one, whatever is installed; else the
# demo fails.
CHECKED: dict[str, tuple[str, ...]] = {
    "open a gzip file for writing": ("gzip",),
    "parse json from a string": ("json",),
    "find all files that match a pattern": ("glob", "match", "find", "file"),
    "inverse of a matrix": ("inv",),
}
