//! One row of logits, changed for a request: of all tokens, or of the few that it allows alone.

/// Kept between tokens.
#[derive(Debug, Default)]
pub struct Row {
    logits: Vec<f32>,
    /// Whose they are, ascending, where they are of few tokens.
    ids: Option<Vec<u32>>,
    /// The memory of `ids` while they are not needed.
    spare: Vec<u32>,
}

/// Of so many tokens one may be allowed for the others to be left out: a sampler passes over the row more than once.
const FEW: usize = 8;
const WORD: usize = u32::BITS as usize;

impl Row {
    /// Take all of them.
    pub fn copy(&mut self, logits: &[f32]) {
        self.begin();
        self.logits.extend_from_slice(logits);
    }

    /// Take those that `mask` allows, a bit each; where they are not few, the others are minus infinity.
    pub fn copy_allowed(&mut self, logits: &[f32], mask: &[u32]) {
        self.begin();
        let count: usize = mask.iter().map(|word| word.count_ones() as usize).sum();
        if count * FEW > logits.len() {
            return self.copy_most(logits, mask);
        }
        let mut ids = std::mem::take(&mut self.spare);
        for (i, &word) in mask.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                let id = i * WORD + left.trailing_zeros() as usize;
                left &= left - 1;
                if let Some(logit) = logits.get(id) {
                    ids.push(id as u32);
                    self.logits.push(*logit);
                }
            }
        }
        self.ids = Some(ids);
    }

    fn begin(&mut self) {
        self.logits.clear();
        if let Some(mut ids) = self.ids.take() {
            ids.clear();
            self.spare = ids;
        }
    }

    fn copy_most(&mut self, logits: &[f32], mask: &[u32]) {
        self.logits.resize(logits.len(), f32::NEG_INFINITY);
        let words = self.logits.chunks_mut(WORD).zip(logits.chunks(WORD));
        for ((to, from), &word) in words.zip(mask) {
            match word {
                0 => {}
                u32::MAX => to.copy_from_slice(from),
                _ => {
                    for (bit, (to, from)) in to.iter_mut().zip(from).enumerate() {
                        if word >> bit & 1 == 1 {
                            *to = *from;
                        }
                    }
                }
            }
        }
    }

    /// In the order of their tokens' ids.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// A token's logit; none where it is not among them.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut f32> {
        let place = match &self.ids {
            None => id as usize,
            Some(ids) => ids.binary_search(&id).ok()?,
        };
        self.logits.get_mut(place)
    }

    /// Whose the logit at `place` is.
    pub fn id(&self, place: u32) -> u32 {
        let ids = self.ids.as_ref().and_then(|ids| ids.get(place as usize));
        ids.copied().unwrap_or(place)
    }
}
