"""A suite that tells whether a SAM-like optimizer keeps what users rely on, for any implementation.

    import fastpost
    from fastpost.conformance import sam_conformance

    results = sam_conformance(fastpost.SAM)     # prints a table

or ``python -m fastpost.conformance module:make_optimizer``, where `make_optimizer(params, base_optimizer_class,
rho=..., **base_kwargs)` builds the optimizer. If its steps are driven in another way than `first_step`/`second_step` or
`step(closure)`, an `Adapter` says how.
"""

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, NotApplicable, properties
from fastpost.conformance.results import Result
from fastpost.conformance.suite import sam_conformance

__all__ = ["Adapter", "Failure", "NotApplicable", "Result", "properties", "sam_conformance"]
