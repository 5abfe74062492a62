//! How much memory this process may still take. Reads what the system says; nothing of models.

use std::fs;

/// Bytes that can be had without swapping: the machine's, or the control group's if that is less. `None` where the system
/// does not say.
pub fn available() -> Option<u64> {
    let machine = meminfo(&fs::read_to_string("/proc/meminfo").ok()?);
    let group = group_left("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current");
    match (machine, group) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kb| kb * 1024)
}

fn group_left(limit: &str, used: &str) -> Option<u64> {
    let read = |path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    Some(read(limit)?.saturating_sub(read(used)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_kilobytes() {
        assert_eq!(
            meminfo("MemTotal: 9 kB\nMemAvailable:    24 kB\n"),
            Some(24 * 1024)
        );
        assert_eq!(meminfo("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn a_group_without_a_limit_does_not_count() {
        assert_eq!(group_left("/nonexistent/max", "/nonexistent/current"), None);
    }
}
