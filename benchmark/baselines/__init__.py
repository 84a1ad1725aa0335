"""Methods that propose designs for one new patient, all compared by the same count of calls."""
