"""As much of the package easydict as pcdet's configurations need: keys are attributes too."""


class EasyDict(dict):
    def __init__(self, content):
        super().__init__({key: self._wrap(value) for key, value in content.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def _wrap(cls, value):
        if isinstance(value, dict):
            return cls(value)
        return [cls._wrap(entry) for entry in value] if isinstance(value, (list, tuple)) else value
