//! Who runs in the next step. Pure bookkeeping: testable without a model.

/// One running request, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    pub id: u64,
    /// Rows that it wants, at least one.
    pub rows: usize,
    /// Whether they are of its prompt, of which a part may run; else it decodes.
    pub prompt: bool,
    /// Higher is sooner.
    pub priority: i32,
}

/// Hand out `budget` rows: to those who decode what they want, to prompts of the rest `prompts` at most.
///
/// `jobs` stand in order of arrival. Among prompts of the highest priority the oldest gets half, so that it gets on
/// whatever comes; the shortest are served first with the rest, so that nobody waits for long behind a long one. Returns
/// (id, rows) of the jobs that run, rows above 0, the decoding ones first.
pub fn plan(jobs: &[Job], budget: usize, prompts: usize) -> Vec<(u64, usize)> {
    let mut left = budget;
    let mut steps = Vec::new();
    for job in jobs.iter().filter(|job| !job.prompt) {
        let rows = job.rows.min(left);
        if rows > 0 {
            steps.push((job.id, rows));
            left -= rows;
        }
    }
    left = left.min(prompts);
    let mut waiting: Vec<Job> = jobs.iter().copied().filter(|job| job.prompt).collect();
    waiting.sort_by_key(|job| (-i64::from(job.priority), job.rows));
    let Some(first) = waiting.first() else {
        return steps;
    };
    let highest = first.priority;
    let oldest = jobs
        .iter()
        .find(|job| job.prompt && job.priority == highest);
    let mut given: Vec<usize> = vec![0; waiting.len()];
    for (job, given) in waiting.iter().zip(&mut given) {
        if oldest.is_some_and(|oldest| oldest.id == job.id) {
            *given = job.rows.min(left.div_ceil(2));
            left -= *given;
        }
    }
    for (job, given) in waiting.iter().zip(&mut given) {
        let more = (job.rows - *given).min(left);
        *given += more;
        left -= more;
    }
    let given = waiting.iter().zip(given).map(|(job, rows)| (job.id, rows));
    steps.extend(given.filter(|(_, rows)| *rows > 0));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(id: u64, rows: usize) -> Job {
        Job {
            id,
            rows,
            prompt: true,
            priority: 0,
        }
    }

    fn decode(id: u64) -> Job {
        Job {
            prompt: false,
            ..prompt(id, 1)
        }
    }

    #[test]
    fn nobody_decoding_waits_for_a_long_prompt() {
        let jobs = [prompt(0, 900), decode(1), decode(2)];
        assert_eq!(plan(&jobs, 512, 512), [(1, 1), (2, 1), (0, 510)]);
        assert_eq!(plan(&jobs, 512, 32), [(1, 1), (2, 1), (0, 32)]);
    }

    #[test]
    fn who_decodes_gets_the_rows_it_wants() {
        let jobs = [Job {
            rows: 5,
            ..decode(1)
        }];
        assert_eq!(plan(&jobs, 512, 512), [(1, 5)]);
        assert_eq!(plan(&jobs, 3, 512), [(1, 3)]);
    }

    #[test]
    fn a_short_prompt_overtakes_a_long_one_that_still_gets_half() {
        let jobs = [prompt(0, 3000), prompt(1, 100)];
        assert_eq!(plan(&jobs, 512, 512), [(1, 100), (0, 412)]);
        assert_eq!(plan(&jobs, 512, 64), [(1, 32), (0, 32)]);
        let jobs = [prompt(0, 300), prompt(1, 100), prompt(2, 200)];
        assert_eq!(plan(&jobs, 512, 512), [(1, 100), (2, 156), (0, 256)]);
    }

    #[test]
    fn a_higher_priority_comes_first() {
        let urgent = Job {
            priority: 1,
            ..prompt(1, 600)
        };
        assert_eq!(plan(&[prompt(0, 10), urgent], 512, 512), [(1, 512)]);
        let lower = Job {
            priority: -1,
            ..prompt(1, 5)
        };
        assert_eq!(plan(&[prompt(0, 10), lower], 12, 12), [(0, 10), (1, 2)]);
    }

    #[test]
    fn the_budget_is_never_exceeded() {
        let jobs = [decode(0), decode(1), decode(2), prompt(3, 5)];
        assert_eq!(plan(&jobs, 2, 2), [(0, 1), (1, 1)]);
        assert_eq!(plan(&[prompt(0, 7)], 0, 0), []);
    }

    #[test]
    fn every_job_runs_when_the_budget_allows() {
        let jobs = [prompt(0, 3), decode(1), prompt(2, 2)];
        assert_eq!(plan(&jobs, 100, 100), [(1, 1), (2, 2), (0, 3)]);
        assert_eq!(plan(&[], 100, 100), []);
    }
}
