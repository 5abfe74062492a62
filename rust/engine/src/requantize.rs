//! A model's tensors in other types: one at a time, on all threads.

use std::collections::HashMap;
use std::path::Path;

use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::TensorType;

use crate::conversion::Conversion;
use crate::error::{Error, Result};
use crate::export::{Export, Exported};
use crate::gguf::write::{Planned, Writer, copied, entry, own_entries};
use crate::recipe::Recipe;
use crate::weights::{Target, Tensor, Weights};
use crate::{files, gguf};

/// Types that hold a model as it was made: others have lost something already.
const WHOLE: [TensorType; 4] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
];

/// How much an error of each input counts, by the name of the tensor: the mean square of what went into it
/// (llama.cpp's `llama-imatrix`). As long as a row; of experts, a row for each.
#[derive(Debug, Default)]
pub struct Importance(HashMap<String, Vec<f32>>);

impl Importance {
    /// From a GGUF file of `llama-imatrix`: tensors `NAME.in_sum2` and `NAME.counts`.
    ///
    /// # Errors
    /// [`Error::ModelFile`] for a file that is none, or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let file = gguf::open(path)?;
        let mut all = HashMap::new();
        for name in file.tensors.keys() {
            let Some(tensor) = name.strip_suffix(".in_sum2") else {
                continue;
            };
            let sums = file.require(name)?;
            let counts = file.require(&format!("{tensor}.counts"))?.dequantize();
            let (rows, cols) = (sums.rows(), sums.cols());
            if counts.len() != rows {
                let problem = format!(
                    "{tensor} has {rows} rows of sums and {} counts",
                    counts.len()
                );
                return Err(file.problem(problem));
            }
            let mut means = sums.dequantize();
            for (row, count) in means.chunks_exact_mut(cols.max(1)).zip(counts) {
                row.iter_mut().for_each(|x| *x /= count.max(1.0));
            }
            if !means.iter().all(|x| x.is_finite() && *x >= 0.0) {
                return Err(file.problem(format!("{tensor} has sums of squares that are none")));
            }
            all.insert(tensor.to_owned(), means);
        }
        match all.is_empty() {
            true => Err(file.problem("holds no importance matrix: no tensor NAME.in_sum2")),
            false => Ok(Self(all)),
        }
    }

    /// For the rows of a tensor from `row` on.
    fn of(&self, tensor: &Tensor, row: usize) -> Option<&[f32]> {
        let means = self.0.get(tensor.name)?;
        let cols = tensor.cols();
        let experts = means
            .len()
            .checked_div(cols)
            .filter(|n| n * cols == means.len())?;
        let each = tensor.rows().checked_div(experts).filter(|n| *n > 0)?;
        means.get(row / each * cols..(row / each + 1) * cols)
    }
}

/// The blocks of `tensor` in the type `to`.
///
/// # Errors
/// [`Error::ModelFile`] where rows of it are no whole number of blocks.
pub fn tensor(
    pool: &Pool,
    from: &Tensor,
    to: TensorType,
    importance: &Importance,
) -> Result<Vec<u8>> {
    let target = Target {
        tensor_type: to,
        nested: false,
    };
    let conversion = Conversion::new(pool, *from, target)?;
    Ok(conversion.blocks(pool, |row| importance.of(from, row)))
}

/// What is to become of a file.
pub struct Wanted {
    pub recipe: Recipe,
    pub importance: Importance,
    /// Also what was quantised before: its errors add up.
    pub again: bool,
}

/// What became of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requantized {
    pub tensors: usize,
    /// Of all tensors, before and after.
    pub bytes_before: u64,
    pub bytes: u64,
}

/// Write the model at `source` as `wanted` says to the GGUF file `out`, whole or not at all. `progress(done, total)` is told
/// in bytes of the source; false stops it with `Closed`.
///
/// # Errors
/// [`Error::ModelFile`] where a file cannot be read or written; [`Error::Unsupported`] for a source that is quantised
/// already, or a checkpoint that cannot be said in a GGUF file: see [`Export`].
pub fn file(
    source: &Path,
    wanted: &Wanted,
    out: &Path,
    threads: Option<usize>,
    progress: &dyn Fn(u64, u64) -> bool,
) -> Result<Requantized> {
    let weights = files::open(source)?;
    let export = match weights.config {
        Some(_) => Some(Export::new(&weights, source)?),
        None => None,
    };
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let part = out.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let made = write(&weights, export.as_ref(), wanted, &part, threads, progress);
    let made = made.and_then(|made| {
        if let Some(export) = &export {
            export.check(&mut gguf::open(&part)?)?;
        }
        std::fs::rename(&part, out).map_err(|e| Error::ModelFile {
            path: out.display().to_string(),
            problem: e.to_string(),
        })?;
        Ok(made)
    });
    if made.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    made
}

/// A tensor that will be written: as its source has it, or made for the file.
struct Item<'a> {
    name: &'a str,
    shape: &'a [usize],
    from: TensorType,
    exported: Option<&'a Exported>,
}

fn items<'a>(weights: &'a Weights, export: Option<&'a Export>) -> Result<Vec<Item<'a>>> {
    if let Some(export) = export {
        let item = |exported: &'a Exported| Item {
            name: &exported.name,
            shape: &exported.shape,
            from: exported.tensor_type,
            exported: Some(exported),
        };
        return Ok(export.tensors.iter().map(item).collect());
    }
    let mut names: Vec<&String> = weights.tensors.keys().collect();
    names.sort_by_key(|name| weights.tensors.get(*name).map(|t| (t.file, t.bytes.start)));
    let item = |name: &'a String| {
        let tensor = weights.require(name)?;
        Ok(Item {
            name: tensor.name,
            shape: tensor.shape,
            from: tensor.tensor_type,
            exported: None,
        })
    };
    names.into_iter().map(item).collect()
}

fn write(
    weights: &Weights,
    export: Option<&Export>,
    wanted: &Wanted,
    part: &Path,
    threads: Option<usize>,
    progress: &dyn Fn(u64, u64) -> bool,
) -> Result<Requantized> {
    let file_type = wanted.recipe.file_type.ok_or_else(|| Error::Unsupported {
        what: "type of a GGUF file",
        name: wanted.recipe.name.into(),
        supported: "Q4_K_M, Q4_0, Q8_0 and others; this one a model can be while it is loaded"
            .into(),
    })?;
    let items = items(weights, export)?;
    let model = match export {
        Some(export) => export.shape(),
        None => gguf_shape(weights)?,
    };
    let planned: Vec<Planned> = items
        .iter()
        .map(|item| plan(item, wanted, model))
        .collect::<Result<_>>()?;
    let mut metadata = match export {
        Some(export) => {
            let keys = export.metadata.iter();
            keys.map(|(key, value)| entry(key, value)).collect()
        }
        None => copied(weights)?,
    };
    metadata.extend(own_entries(file_type));
    let mut writer = Writer::begin(part, &metadata, &planned)?;
    let pool = Pool::new(threads.unwrap_or_else(Pool::available));
    let (total, mut done) = (weights.total_bytes(), 0);
    for (item, planned) in items.iter().zip(&planned) {
        let mut own = Vec::new();
        let from = match item.exported {
            Some(exported) => exported.read(weights, &mut own)?,
            None => weights.require(item.name)?,
        };
        match planned.tensor_type == from.tensor_type {
            true => writer.tensor(from.data)?,
            false => {
                let importance = &wanted.importance;
                writer.tensor(&tensor(&pool, &from, planned.tensor_type, importance)?)?;
            }
        }
        from.forget(0..from.data.len());
        done = total.min(done + from.data.len() as u64);
        if !progress(done, total) {
            return Err(Error::Closed);
        }
    }
    writer.end()?;
    progress(total, total);
    Ok(Requantized {
        tensors: planned.len(),
        bytes_before: total,
        bytes: planned.iter().map(|tensor| tensor.bytes as u64).sum(),
    })
}

/// Layers of a GGUF model, and whether its embedding is its output too.
fn gguf_shape(weights: &Weights) -> Result<(usize, bool)> {
    let tied = !weights.tensors.contains_key("output.weight");
    let architecture = weights.get_str("general.architecture")?.unwrap_or_default();
    let layers = weights.get_usize(&format!("{architecture}.block_count"))?;
    Ok((layers.unwrap_or(0), tied))
}

fn plan<'a>(
    item: &Item<'a>,
    wanted: &Wanted,
    (layers, tied): (usize, bool),
) -> Result<Planned<'a>> {
    if !wanted.again && !WHOLE.contains(&item.from) {
        return Err(Error::Unsupported {
            what: "source type",
            name: format!("{} of {}", item.from.name(), item.name),
            supported: WHOLE.map(TensorType::name).join(", "),
        });
    }
    let tensor_type = match item.shape {
        [_] | [] => item.from,
        shape => wanted.recipe.tensor_type(item.name, shape, layers, tied),
    };
    let cols = item.shape.last().copied().unwrap_or(1);
    let rows = item.shape.iter().product::<usize>() / cols.max(1);
    Ok(Planned {
        name: item.name,
        tensor_type,
        shape: item.shape,
        bytes: tensor_type.row_bytes(cols).unwrap_or(0) * rows,
    })
}
