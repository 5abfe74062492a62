//! A local path to [`Weights`]: which of the readers it is for. Paths only, never URLs.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::weights::Weights;
use crate::{gguf, safetensors};

/// Names of a directory's entries that an error shows.
const SHOWN: usize = 8;

/// Open the model at `path`: a `.gguf` file (or any part of a split one), a directory with `config.json` and
/// safetensors files, or a directory with exactly one GGUF model.
///
/// # Errors
/// [`Error::ModelFile`] where there is no model or more than one, saying what was found; and all of [`gguf::open`] and
/// [`safetensors::open`].
pub fn open(path: &Path) -> Result<Weights> {
    let error = |problem: String| Error::ModelFile {
        path: path.display().to_string(),
        problem,
    };
    let kind = fs::metadata(path).map_err(|e| error(e.to_string()))?;
    if kind.is_dir() {
        return open_directory(path);
    }
    if path.extension().is_some_and(|e| e == "safetensors") {
        return Err(error(
            "give the directory that holds this file and its config.json".into(),
        ));
    }
    gguf::open(path)
}

fn open_directory(dir: &Path) -> Result<Weights> {
    let has = |name: &str| dir.join(name).exists();
    if has(safetensors::SINGLE) || has(safetensors::INDEX) {
        return safetensors::open(dir);
    }
    let error = |problem: String| Error::ModelFile {
        path: dir.display().to_string(),
        problem,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| error(e.to_string()))? {
        let name = entry.map_err(|e| error(e.to_string()))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    let models: Vec<&String> = names.iter().filter(|n| is_first_gguf(n)).collect();
    match models[..] {
        [name] => gguf::open(&dir.join(name)),
        [] => Err(error(format!(
            "holds no model: wanted one .gguf file, or {} beside {}; found {}",
            safetensors::SINGLE,
            safetensors::CONFIG,
            listed(&names)
        ))),
        _ => Err(error(format!(
            "holds {} GGUF models, name one of them: {}",
            models.len(),
            listed(&models)
        ))),
    }
}

/// The shape and the numbers of one tensor of the model at `path`, row after row; of a quantised one, what its format says
/// they are.
///
/// # Errors
/// Those of [`open`]; [`Error::ModelFile`] where there is no tensor of this name.
pub fn numbers(path: &Path, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
    let weights = open(path)?;
    if let Some(matrix) = weights.quantised.get(name) {
        return Ok((matrix.shape.into(), matrix.floats(&weights.files, None)));
    }
    let tensor = weights.require(name)?;
    Ok((tensor.shape.into(), tensor.dequantize()))
}

/// A GGUF file that is not one of the later parts of a split model.
fn is_first_gguf(name: &str) -> bool {
    name.ends_with(".gguf") && gguf::split_name(name).is_none_or(|(_, number, _)| number == 1)
}

fn listed(names: &[impl AsRef<str>]) -> String {
    let mut shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    if names.len() > SHOWN {
        shown.push("...");
    }
    if shown.is_empty() {
        "nothing".into()
    } else {
        shown.join(", ")
    }
}
