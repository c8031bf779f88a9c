# SPDX-License-Identifier: Apache-2.0
"""Pentad behind the registries of other libraries; each module imports its library."""
