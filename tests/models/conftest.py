"""What is run by hand, with packages that the tests do not want, is no test."""

collect_ignore = ["record_resnet18.py"]
