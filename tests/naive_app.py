"""The usual demo, to be measured against: Keras in the web process, `model.predict` in every request."""

import os

import keras
import numpy as np
from flask import Flask, jsonify, request
from PIL import Image

app = Flask(__name__)
model = keras.models.load_model(os.environ["FLASK_MODEL"])
LABELS = ("glioma", "meningioma", "no_tumor", "pituitary")


@app.post("/upload")
def upload():
    picture = Image.open(request.files["file"]).convert("RGB").resize((224, 224))
    (probabilities,) = model.predict(np.asarray(picture, "float32")[None], verbose=0)
    return jsonify(dict(zip(LABELS, map(float, probabilities))))
