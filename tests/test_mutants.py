"""The list of faults fits the code as it is (make mutants runs them)."""

from tests import mutants


def test_every_fault_is_found_once_in_its_file_and_names_tests_that_there_are():
    faults = mutants.read()
    assert len(faults) > 40
    assert all(fault["old"] != fault["new"] for fault in faults)
