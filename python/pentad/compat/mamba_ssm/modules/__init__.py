# SPDX-License-Identifier: Apache-2.0
"""Modules, by the files in which mamba_ssm has them."""
