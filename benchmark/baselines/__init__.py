"""Methods that propose designs for one new patient, all judged by the same count of calls."""
