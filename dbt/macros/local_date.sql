{#- The day of a timestamp in the time zone of the fraud rules. -#}
{%- macro local_date(timestamp_column) -%}
    date({{ timestamp_column }}, '{{ var("time_zone") }}')
{%- endmacro -%}
