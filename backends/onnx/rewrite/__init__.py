"""From other graphs to the node (`convert`) and back to operators that a runtime brings (`lower`): `attnhub onnx convert`, `lower`."""
