"""The exceptions for a user's mistake, and what to say of those of others."""


class UserError(Exception):
  """A mistake that the user can mend: what was expected, what was found, what to do.

  The command line prints it in at most three lines and ends with exit code 2. Code below
  `experiment/` raises it only where no plain ValueError would do (data that cannot be had).
  """


class MissingData(UserError):
  """A data set that is neither in its place nor to be had from where it is published."""


def reason(error: Exception, length: int = 120) -> str:
  """The first line of what an error says, or its type where it says nothing.

  >>> reason(ValueError("no zip file\\nat all")), reason(KeyError())
  ('no zip file', 'KeyError')
  """
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
