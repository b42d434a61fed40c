"""The API with PEFT's names: functions that adapt a model, and the methods that an adapted model has."""
