"""The conformance suite: every backend against the definition, on cases made from what it declares.

In a backend's test file::

    from attnhub import testing

    @pytest.mark.parametrize("check", testing.checks("mybackend", device="cpu"), ids=str)
    def test_conformance(check):
        check.run()

`checks` gives one check per case and kind: ``forward`` (with and without lse, NaN around the buffers; where a call
appends to a K/V cache, every bit of that too), ``backward``,
``repeat`` (bitwise equal runs, where declared) and ``reject`` (features that are not declared are refused with their code).
``python -m attnhub.testing --backend cuda --device cuda --level full --output result.json`` runs the same as a program.

The error rule, after flash-attention's tests: against the definition in fp64, the largest error may be twice that of the
same maths in the inputs' dtype by plain torch operations, plus one rounding unit of the largest reference value. For fp8 inputs
the definition takes the numbers that they stand for, the plain maths are those of a kernel with fp8 operands everywhere (fp32, the
weights rounded to e4m3 on a scale of 256 before they meet v, out in bf16), and the unit is bf16's.
"""

from attnhub.testing.case import Case
from attnhub.testing.cases import cases
from attnhub.testing.checks import Check, Outcome, checks

__all__ = ["Case", "Check", "Outcome", "cases", "checks"]
