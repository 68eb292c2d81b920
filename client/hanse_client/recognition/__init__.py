"""The recognizer at work: photos in batches through one network, products found by photo, new releases without a pause.

What REST, gRPC, the page and the commands share is `hanse_client.recognition.service.Recognition`.
"""
