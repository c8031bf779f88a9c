# SPDX-License-Identifier: Apache-2.0
"""Functions, by the modules in which mamba_ssm has them."""
