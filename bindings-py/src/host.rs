//! What this host can run.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use vmcore::host::{self, Status};

/// What is known about one backend on this host.
#[pyclass(frozen, get_all, module = "vmcore")]
#[derive(Clone)]
pub struct BackendReport {
    /// Name of the backend.
    name: &'static str,
    /// "usable", "small_guests_only" or "not_usable".
    status: &'static str,
    /// Why, in one sentence.
    reason: String,
    /// What the user should do; empty where there is nothing to do.
    advice: String,
    /// The facts behind it.
    details: BTreeMap<&'static str, String>,
}

#[pymethods]
impl BackendReport {
    fn __repr__(&self) -> String {
        format!("<BackendReport {}: {}>", self.name, self.status)
    }
}

/// Every backend on this host, the one that accel="auto" takes first.
#[pyclass(frozen, module = "vmcore")]
pub struct Report(host::Report);

#[pymethods]
impl Report {
    /// One entry a backend.
    #[getter]
    fn backends(&self) -> Vec<BackendReport> {
        let report = |report: &host::BackendReport| BackendReport {
            name: report.name,
            status: match report.status {
                Status::Usable => "usable",
                Status::SmallGuestsOnly => "small_guests_only",
                _ => "not_usable",
            },
            reason: report.reason.clone(),
            advice: report.advice.clone(),
            details: report.details.iter().cloned().collect(),
        };
        self.0.backends.iter().map(report).collect()
    }

    /// Whether some backend runs every guest.
    #[getter]
    fn usable(&self) -> bool {
        self.0.backends.iter().any(|backend| backend.status == Status::Usable)
    }

    fn _repr_html_(&self) -> String {
        let rows: String = self
            .0
            .backends
            .iter()
            .map(|b| {
                let cells = [b.name, &b.status.to_string(), &b.reason, &b.advice].map(escape);
                format!("<tr><td>{}</td></tr>", cells.join("</td><td>"))
            })
            .collect();
        format!("<table><tr><th>backend</th><th>status</th><th>why</th><th>do</th></tr>{rows}</table>")
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        let backends =
            self.0.backends.iter().map(|b| format!("{}: {}", b.name, b.status)).collect::<Vec<_>>();
        format!("<Report {}>", backends.join(", "))
    }
}

/// Text for HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Looks at every backend, which takes a few milliseconds.
#[pyfunction]
pub fn check(py: Python<'_>) -> Report {
    Report(py.detach(host::check))
}
