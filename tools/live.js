// Added to each page by tools/live.py: one button that makes its code live
(() => {
  const cells = [...document.querySelectorAll("div.cell")].filter(
    cell => cell.querySelector(".cell_input pre"));
  if (!cells.length) return;
  const place = document.createElement("p");
  place.className = "live-bar";
  place.innerHTML = '<button type="button" class="btn btn-primary">' +
    "Make the code of this page live</button> <span role='status'></span>";
  document.querySelector("article h1").after(place);
  const [button, status] = place.children;

  const start = () => {
    thebe.on("status", (_, data) => {
      const text = { ready: "ready: change a cell, and run it with Shift+Enter",
                     error: "there is no connection to the kernel" };
      if (/kernel|session|server/.test(data.subject))
        status.textContent = `Python: ${text[data.status] ?? data.status}`;
    });
    for (const cell of cells) {
      const code = cell.querySelector(".cell_input pre");
      code.textContent = code.textContent;  // nothing of it is folded
      code.dataset.executable = "";
      code.dataset.language = "python";
      cell.querySelector(".copybtn")?.remove();
      let output = cell.querySelector(".cell_output");
      if (!output) {
        output = document.createElement("div");
        output.className = "cell_output";
        cell.append(output);
      }
      output.dataset.output = "";
    }
    thebe.bootstrap({
      useBinder: false, requestKernel: true, mathjaxUrl: "",
      kernelOptions: { kernelName: "python3",
        path: "chapters/" + location.pathname.split("/").pop()
          .replace(".html", ".ipynb") },
      serverSettings: { baseUrl: location.origin, token: "",
        wsUrl: location.origin.replace("http", "ws"), appendToken: false },
    });
  };

  button.onclick = () => {
    button.disabled = true;
    status.textContent = "Python: starting";
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = "/thebe/thebe.css";
    const script = document.createElement("script");
    script.src = "/thebe/index.js";
    script.onload = start;
    document.head.append(style, script);
  };
})();
