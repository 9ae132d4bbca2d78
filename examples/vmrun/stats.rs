//! What `--stats` writes: when things happened, why the guest was left, how much memory it took.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmcore::backend::VcpuStats;
use vmcore::{Outcome, VmStats};
use vmdevices::console::{Console, Descriptor, Input};

/// What process 1's start looks like on the console: Linux's own line, and our test guests'.
const INIT_MARKS: [&[u8]; 2] = [b"Run /init as init process", b"vmcore-guest: init"];

#[derive(Debug, Default)]
struct Marks {
    created: Option<Instant>,
    first_byte: Option<Instant>,
    init: Option<Instant>,
    ended: Option<Instant>,
    /// The end of the console's output, in which a mark may begin.
    tail: Vec<u8>,
}

/// When things happened.
#[derive(Clone, Debug)]
pub struct Times {
    begin: Instant,
    marks: Arc<Mutex<Marks>>,
}

impl Times {
    /// Begins to watch; times count from `begin`.
    pub fn new(begin: Instant) -> Self {
        Self { begin, marks: Arc::default() }
    }

    fn marks(&self) -> std::sync::MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM is made.
    pub fn created(&self) {
        self.marks().created = Some(Instant::now());
    }

    /// The guest has ended.
    pub fn ended(&self) {
        self.marks().ended = Some(Instant::now());
    }

    /// Passes `console` on and looks at what the guest writes.
    pub fn watch(&self, console: Box<dyn Console>) -> Watched {
        Watched { inner: console, marks: self.marks.clone(), done: false }
    }

    /// Everything, as a JSON object.
    pub fn to_json(&self, backend: &str, stats: &VmStats, outcome: Option<&Outcome>) -> String {
        let marks = self.marks();
        let since = |mark: Option<Instant>| {
            let microseconds = |mark: Instant| mark.saturating_duration_since(self.begin).as_secs_f64() * 1e6;
            mark.map(|mark| microseconds(mark).round() / 1e3)
        };
        let sum = |count: fn(&VcpuStats) -> u64| stats.vcpus.iter().map(count).sum::<u64>();
        let named = |all: &[(String, u64)]| all.iter().cloned().collect();
        let report = Report {
            outcome: outcome.map_or_else(|| "error".into(), |outcome| format!("{outcome:?}")),
            created_ms: since(marks.created),
            first_instruction_ms: since(stats.first_entry),
            first_byte_ms: since(marks.first_byte),
            init_ms: since(marks.init),
            end_ms: since(marks.ended),
            peak_rss_kib: peak_rss_kib(),
            vcpus: stats.vcpus.len(),
            exits: sum(|v| v.exits),
            exits_port: sum(|v| v.port),
            exits_mmio: sum(|v| v.mmio),
            exits_halt: sum(|v| v.halt),
            exits_interrupted: sum(|v| v.interrupted),
            exits_debug: sum(|v| v.debug),
            exits_shutdown: sum(|v| v.shutdown),
            backend: backend.into(),
            backend_vm: named(&stats.backend_vm),
            backend_vcpus: stats.backend_vcpus.iter().map(|vcpu| named(vcpu)).collect(),
        };
        // A structure of names and numbers: nothing that JSON cannot say.
        serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"
    }
}

/// What is written. Times are in milliseconds from the begin of `main`, null where it did not
/// happen; counts of exits are summed over the vCPUs.
#[derive(Debug, Serialize)]
struct Report {
    outcome: String,
    /// Memory, devices and vCPUs were there and the kernel was loaded.
    created_ms: Option<f64>,
    first_instruction_ms: Option<f64>,
    /// The guest's first byte was written to the console.
    first_byte_ms: Option<f64>,
    /// Process 1 said that it starts.
    init_ms: Option<f64>,
    end_ms: Option<f64>,
    /// The largest resident set of the process, guest memory included, in KiB.
    peak_rss_kib: Option<u64>,
    vcpus: usize,
    exits: u64,
    exits_port: u64,
    exits_mmio: u64,
    exits_halt: u64,
    exits_interrupted: u64,
    exits_debug: u64,
    exits_shutdown: u64,
    /// What ran the guest, and its own statistics by its own names.
    backend: String,
    backend_vm: BTreeMap<String, u64>,
    backend_vcpus: Vec<BTreeMap<String, u64>>,
}

/// The process's largest resident set so far, guest memory included (proc(5), VmHWM).
fn peak_rss_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// A console whose output is looked at on its way.
pub struct Watched {
    inner: Box<dyn Console>,
    marks: Arc<Mutex<Marks>>,
    /// Nothing more is looked for.
    done: bool,
}

impl Watched {
    fn look(&mut self, bytes: &[u8]) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.first_byte.get_or_insert_with(Instant::now);
        marks.tail.extend_from_slice(bytes);
        if INIT_MARKS.iter().any(|mark| marks.tail.windows(mark.len()).any(|part| part == *mark)) {
            marks.init = Some(Instant::now());
            marks.tail = Vec::new();
            self.done = true;
        } else {
            let longest = INIT_MARKS.iter().map(|mark| mark.len()).max().unwrap_or(0);
            let keep_from = marks.tail.len().saturating_sub(longest);
            marks.tail.drain(..keep_from);
        }
    }
}

impl Console for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        if !self.done {
            self.look(&bytes[..taken]);
        }
        Ok(taken)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        self.inner.read(buffer)
    }

    fn input(&self) -> Option<Descriptor> {
        self.inner.input()
    }

    fn output(&self) -> Option<Descriptor> {
        self.inner.output()
    }

    fn size(&self) -> Option<(u16, u16)> {
        self.inner.size()
    }

    fn patience(&self) -> Duration {
        self.inner.patience()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use vmdevices::console;

    #[test]
    fn the_report_is_json_with_every_figure() {
        let begin = Instant::now();
        let times = Times::new(begin);
        let (console, _script) = console::memory().unwrap();
        let mut console = times.watch(Box::new(console));
        times.created();
        console.write(b"[    1.0] Run /init as i").unwrap();
        let early: Value = serde_json::from_str(&times.to_json("kvm", &VmStats::default(), None)).unwrap();
        assert!(early["first_byte_ms"].is_number() && early["init_ms"].is_null());
        assert_eq!(early["outcome"], "error");

        console.write(b"nit process\r\n").unwrap();
        times.ended();
        let mut stats = VmStats::default();
        for port in [3, 4] {
            let mut vcpu = VcpuStats::default();
            (vcpu.exits, vcpu.port, vcpu.halt) = (10, port, 1);
            stats.vcpus.push(vcpu);
            stats.backend_vcpus.push(vec![("io_exits".into(), port)]);
        }
        stats.first_entry = Some(Instant::now());
        stats.backend_vm = vec![("a \"name\"".into(), u64::MAX)];
        let outcome = Outcome::Exit(7);
        let json: Value = serde_json::from_str(&times.to_json("kvm", &stats, Some(&outcome))).unwrap();
        for time in ["created_ms", "first_instruction_ms", "first_byte_ms", "init_ms", "end_ms"] {
            assert!(json[time].as_f64().unwrap() >= 0.0, "{time}: {json}");
        }
        assert!(json["created_ms"].as_f64() <= json["init_ms"].as_f64(), "{json}");
        assert!(json["peak_rss_kib"].as_u64().unwrap() > 100, "{json}");
        assert_eq!((&json["outcome"], &json["backend"]), (&"Exit(7)".into(), &"kvm".into()));
        assert_eq!((&json["vcpus"], &json["exits"], &json["exits_port"]), (&2.into(), &20.into(), &7.into()));
        assert_eq!((&json["exits_halt"], &json["exits_mmio"]), (&2.into(), &0.into()));
        assert_eq!(json["backend_vm"]["a \"name\""], u64::MAX);
        assert_eq!(json["backend_vcpus"][1]["io_exits"], 4);
    }
}
