// The pages work without this: it marks the section that is read, opens a
// picture on the page instead of by itself, and lets Escape hide a definition
(() => {
  const start = () => {
    const links = [...document.querySelectorAll("#contents-of-page a")];
    const sections = links.map(
      link => document.getElementById(decodeURIComponent(link.hash.slice(1))));
    let chosen = null, waiting = false;

    const mark = () => {
      waiting = false;
      const line = innerHeight * 0.25, root = document.documentElement;
      let current = chosen ?? sections.findLastIndex(
        section => section && section.getBoundingClientRect().top <= line);
      if (chosen === null && root.scrollHeight > innerHeight + 200 &&
          scrollY + innerHeight >= root.scrollHeight - 2)
        current = links.length - 1;
      links.forEach((link, i) => {
        link.classList.toggle("active", i === current);
        if (i === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      });
      for (const item of document.querySelectorAll(
          "#contents-of-page .toc-entry"))
        item.classList.toggle("active", item.contains(links[current] ?? null));
    };
    const later = () => {
      if (!waiting) requestAnimationFrame(mark);
      waiting = true;
    };
    if (links.length) {
      const choose = () => {
        const index = links.findIndex(link => link.hash === location.hash);
        chosen = index < 0 ? null : index;
        later();
      };
      links.forEach((link, i) => link.addEventListener("click", () => {
        chosen = i;
        later();
      }));
      addEventListener("hashchange", choose);
      addEventListener("scroll", later, {passive: true});
      addEventListener("resize", later, {passive: true});
      // What is chosen stays so until the reader moves the page himself
      for (const move of ["wheel", "touchmove", "keydown", "pointerdown"])
        addEventListener(move, event => {
          if (event.target.closest?.("#contents-of-page")) return;
          chosen = null;
        }, {passive: true});
      choose();
    }

    const dialog = document.createElement("dialog");
    dialog.className = "enlarged";
    dialog.setAttribute("aria-label", "Figure");
    dialog.innerHTML =
      '<form method="dialog"><button>Close</button></form><div></div>';
    const [, place] = dialog.children;
    place.tabIndex = 0;
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Picture");
    dialog.addEventListener("click", event => {
      if (event.target === dialog || event.target.localName === "img")
        dialog.close();
    });
    document.addEventListener("click", event => {
      const link = event.target.closest?.("a.enlarge");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      const image = link.querySelector("img").cloneNode();
      for (const name of ["style", "width", "height"])
        image.removeAttribute(name);
      place.replaceChildren(image);
      if (!dialog.isConnected) document.querySelector("main").append(dialog);
      dialog.showModal();
    });

    // An entry of the index leads to an empty mark: show the page's own words
    if (typeof Search === "object") {
      const summary = Search.makeSearchSummary;
      Search.makeSearchSummary = (page, words, anchor) =>
        summary(page, words, anchor) ?? summary(page, words)
        ?? document.createElement("p");
    }

    const root = document.documentElement;
    addEventListener("keydown", event => {
      if (event.key === "Escape") root.classList.add("no-tips");
    });
    addEventListener("focusin", () => root.classList.remove("no-tips"));
    addEventListener("mouseover", event => {
      const term = event.target.closest?.(".term");
      if (!term?.contains(event.relatedTarget))
        root.classList.remove("no-tips");
    });
  };
  if (document.readyState === "loading")
    addEventListener("DOMContentLoaded", start);
  else start();
})();
