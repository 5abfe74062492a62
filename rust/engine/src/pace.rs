//! What steps take, as measured: how much of a prompt may run beside those who decode, and how many guesses pay. Numbers
//! of rows and seconds alone.

/// How much one step changes what is thought of the next.
const WEIGHT: f32 = 0.2;
/// Steps of decoding after which a figure is forgotten, and tried again if it is cheap enough.
const AGE: u64 = 512;
/// Rows whose cost is known one by one; above, a row costs what a prompt's does.
const ROWS: usize = 64;
/// What a further row is taken to cost of the first, before any was measured.
const ROW: f32 = 0.04;
/// How many times longer than usual those who decode may wait for a step in which a prompt runs.
const WAIT: f32 = 1.6;
/// A guess must make this much faster: it is a guess.
const GAIN: f32 = 1.03;
/// Rows of a prompt that always run, so that it gets on.
const CHUNK: usize = 16;

#[derive(Debug, Clone, Copy, Default)]
struct Figure {
    seconds: f32,
    /// When it was measured, in steps; 0: never.
    at: u64,
}

impl Figure {
    fn measure(&mut self, seconds: f32, now: u64) {
        self.seconds = match self.at {
            0 => seconds,
            // A disturbed step says little.
            _ => self.seconds + WEIGHT * (seconds.min(2.0 * self.seconds) - self.seconds),
        };
        self.at = now;
    }
}

/// The seconds that steps took.
#[derive(Debug)]
pub struct Pace {
    /// By rows, of steps in which nobody's prompt ran.
    decode: [Figure; ROWS + 1],
    /// Of one row of a prompt.
    prompt: Figure,
    steps: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            decode: [Figure::default(); ROWS + 1],
            prompt: Figure::default(),
            steps: 0,
        }
    }
}

impl Pace {
    /// A step took `seconds` for `decode` rows of those who decode and `prompt` rows of prompts.
    pub fn measured(&mut self, decode: usize, prompt: usize, seconds: f32) {
        self.steps += 1;
        if prompt == 0 && (1..=ROWS).contains(&decode) {
            self.decode[decode].measure(seconds, self.steps);
        } else if prompt >= CHUNK {
            let own = seconds - self.cost(decode).unwrap_or(0.0);
            let row = own.max(0.1 * seconds) / prompt as f32;
            self.prompt.measure(row, self.steps);
        }
    }

    fn figure(&self, rows: usize) -> Option<f32> {
        let figure = self.decode[rows];
        (figure.at > 0 && figure.at + AGE > self.steps).then_some(figure.seconds)
    }

    /// What a step of so many decoding rows takes, if any such step was measured: between known figures a straight line,
    /// and hopeful beyond them.
    pub fn cost(&self, rows: usize) -> Option<f32> {
        if rows == 0 {
            return Some(0.0);
        }
        let known = |rows: usize| Some((rows, self.figure(rows)?));
        let within = rows.min(ROWS);
        let below = (1..=within).rev().find_map(known);
        let above = (within..=ROWS).find_map(known);
        let extra = (rows - within) as f32 * self.prompt.seconds;
        let cost = match (below, above) {
            (Some((at, cost)), _) if at == within => cost,
            (Some((low, less)), Some((high, more))) => {
                less + (more - less) * (within - low) as f32 / (high - low) as f32
            }
            (Some((at, cost)), None) => cost * (1.0 + ROW * (within - at) as f32),
            (None, Some((at, cost))) => cost / (1.0 + ROW * (at - within) as f32),
            (None, None) => return None,
        };
        Some(cost + extra)
    }

    /// How many rows of prompts may run beside `decode` rows, `budget` at most: all where nobody decodes.
    pub fn prompt_rows(&self, decode: usize, budget: usize) -> usize {
        if decode == 0 {
            return budget;
        }
        let (Some(usual), true) = (self.cost(decode), self.prompt.at > 0) else {
            return CHUNK.min(budget);
        };
        let rows = (WAIT - 1.0) * usual / self.prompt.seconds;
        // Whole groups of rows, as kernels take them.
        let rows = rows as usize / CHUNK * CHUNK;
        rows.clamp(CHUNK, budget.max(CHUNK)).min(budget)
    }

    /// How many guesses are worth their rows for one who decodes, beside others: `rows` are in the step already, which
    /// are expected to bring `tokens`. `chances`: how likely each guess is, if those before it are. With what they bring.
    pub fn guesses(
        &self,
        rows: usize,
        tokens: f32,
        chances: impl Iterator<Item = f32>,
        most: usize,
    ) -> (usize, f32) {
        let Some(usual) = self.cost(rows) else {
            return (0, 0.0);
        };
        let mut best = (0, 0.0);
        let mut rate = GAIN * tokens / usual;
        let (mut all, mut brings) = (1.0, 0.0);
        for (n, chance) in (1..=most).zip(chances) {
            all *= chance;
            brings += all;
            let Some(cost) = self.cost(rows + n) else {
                break;
            };
            if (tokens + brings) / cost > rate {
                rate = (tokens + brings) / cost;
                best = (n, brings);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(figures: &[(usize, usize, f32)]) -> Pace {
        let mut pace = Pace::default();
        for &(decode, prompt, seconds) in figures {
            pace.measured(decode, prompt, seconds);
        }
        pace
    }

    #[test]
    fn a_prompt_alone_takes_the_whole_budget() {
        assert_eq!(Pace::default().prompt_rows(0, 512), 512);
    }

    #[test]
    fn beside_others_a_prompt_takes_what_they_can_wait_for() {
        // 15 rows in 30 ms, a prompt's row in 0.5 ms: 18 ms more are 36 rows.
        let pace = pace(&[(0, 512, 0.256), (15, 0, 0.030)]);
        assert_eq!(pace.prompt_rows(15, 512), 32);
        assert_eq!(pace.prompt_rows(15, 20), 20);
        // Slow prompts get on nevertheless; before anything is known too.
        assert_eq!(pace.prompt_rows(1, 512), 16);
        assert_eq!(Pace::default().prompt_rows(1, 512), 16);
    }

    #[test]
    fn guesses_are_made_where_their_rows_are_cheap_and_they_are_likely() {
        let cheap = pace(&[(1, 0, 0.010), (8, 0, 0.011)]);
        let (n, brings) = cheap.guesses(1, 1.0, std::iter::repeat(0.9), 7);
        assert_eq!(n, 7);
        assert!((brings - 4.7).abs() < 0.1, "{brings}");
        assert_eq!(cheap.guesses(1, 1.0, std::iter::repeat(0.01), 7).0, 0);
        assert_eq!(cheap.guesses(1, 1.0, std::iter::empty(), 7), (0, 0.0));
        let dear = pace(&[(1, 0, 0.010), (2, 0, 0.020), (8, 0, 0.080)]);
        assert_eq!(dear.guesses(1, 1.0, std::iter::repeat(0.9), 7).0, 0);
        assert_eq!(
            Pace::default().guesses(1, 1.0, std::iter::repeat(1.0), 7).0,
            0
        );
    }

    #[test]
    fn what_was_never_measured_is_tried_and_what_was_long_ago_too() {
        let mut pace = pace(&[(1, 0, 0.010)]);
        assert_eq!(pace.guesses(1, 1.0, std::iter::repeat(0.9), 4).0, 4);
        pace.measured(5, 0, 0.100);
        assert_eq!(pace.guesses(1, 1.0, std::iter::repeat(0.9), 4).0, 0);
        for _ in 0..AGE {
            pace.measured(1, 0, 0.010);
        }
        assert_eq!(pace.guesses(1, 1.0, std::iter::repeat(0.9), 4).0, 4);
    }

    #[test]
    fn one_disturbed_step_changes_little() {
        let mut pace = pace(&[(1, 0, 0.010)]);
        pace.measured(1, 0, 1.0);
        assert!(pace.cost(1).is_some_and(|s| s < 0.0125));
    }
}
