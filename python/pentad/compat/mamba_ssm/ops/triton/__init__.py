# SPDX-License-Identifier: Apache-2.0
"""Functions that mamba_ssm wrote in Triton; here they are native."""
